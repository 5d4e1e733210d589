"""What weighting rows by what diffusion makes of them is worth on the embedded model, one choice at a time.

Each variant changes the whole refit, or what it reads: the weight of visible tokens; importance by noise level, by
certainty or by the loss's gradient; states of the model's own generation instead of random masks; weights of sinks, in
the refit or in the scores. All of a seed and ratio start from the same number of heads gone. Intervals are over seeds
(see studies.py). An interrupted study continues where it stopped.

    python -m scripts.studies.weighting_study --out scripts/results/weightings.json
"""

import sys

from scripts.studies.factor_study import HEAD, MANY, PRODUCERS, VISIBLE
from scripts.studies.fixed_heads import HEADS, Variants, heads_study
from scripts.studies.studies import main

REFIT = MANY | PRODUCERS | HEAD | VISIBLE
WHOLE = "whole refit"
CHANGES: Variants = {
    "visible 1": {"reconstruct.visible": 1.0},
    "visible 0.25": {"reconstruct.visible": 0.25},
    "by noise level": {"reconstruct.weighting": "noise"},
    "by certainty": {"reconstruct.weighting": "certainty"},
    "by gradient": {"reconstruct.weighting": "gradient"},
    "by gradient, visible 1": {"reconstruct.weighting": "gradient", "reconstruct.visible": 1.0},
    "sampler states": {"sink.trajectory": "reverse"},
    "sinks in the refit": {"reconstruct.arm": "masked+sink"},
    "sinks in the scores": {"structured.arm": "masked+sink"},
}
VARIANTS = {WHOLE: REFIT} | {name: REFIT | keys for name, keys in CHANGES.items()}
STUDY = heads_study(
    ("weighting_study", __doc__.splitlines()[0], "scripts/results/weightings.json"),
    VARIANTS,
    [(name, WHOLE) for name in CHANGES],
    {ratio: HEADS[ratio] for ratio in ("0.5", "0.7")},
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
