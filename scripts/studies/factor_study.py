"""What calibration and refit are worth, one factor at a time, with the same number of heads gone in every run.

Distinct text against noisy copies of it, targets of the refit, and how many weights are refitted. All variants of a
seed and ratio remove the same number of heads, so that the measured split, which reacts to all of them, decides
nothing. Intervals are over seeds (see studies.py). An interrupted study continues where it stopped.

    python -m scripts.studies.factor_study --out scripts/results/factors.json
"""

import sys

from scripts.studies.fixed_heads import heads_study, rows_of
from scripts.studies.studies import main

PRODUCERS, MIXED = {"reconstruct.producers": True}, {"reconstruct.target": "mixed"}
HEAD, VISIBLE = {"reconstruct.head": True}, {"reconstruct.visible": 0.5}
STREAM = {"reconstruct.stream": 1.0}

MANY = rows_of(160, 1)
VARIANTS = {
    "32 windows x 5 copies": rows_of(32, 5),
    "80 x 2": rows_of(80, 2),
    "160 x 1": MANY,
    "480 x 1": rows_of(480, 1),
    "160 x 1, layer targets": MANY | {"reconstruct.target": "layer"},
    "160 x 1, mixed targets": MANY | MIXED,
    "160 x 1, producers": MANY | PRODUCERS,
    "160 x 1, producers, mixed targets": MANY | PRODUCERS | MIXED,
    "480 x 1, producers": rows_of(480, 1) | PRODUCERS,
}
CONTRASTS = [
    *((name, "32 windows x 5 copies") for name in ("80 x 2", "160 x 1", "480 x 1")),
    *((name, "160 x 1") for name in VARIANTS if name.startswith("160 x 1,")),
    ("160 x 1, producers, mixed targets", "160 x 1, producers"),
    ("480 x 1, producers", "480 x 1"),
]
STUDY = heads_study(("factor_study", __doc__.splitlines()[0], "scripts/results/factors.json"), VARIANTS, CONTRASTS)

if __name__ == "__main__":
    sys.exit(main(STUDY))
