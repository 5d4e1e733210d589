"""What the whole way gives on the embedded model: widths ranked or searched, then trained back.

Every variant is measured on held-out text under common noise: the loss of NELBO against dense, and what greedy
generation keeps. The search is the one that loses least at that ratio in search.json. Trainings learn block by block
first, then the dense model's predictions. Intervals are over seeds (see studies.py). An interrupted study continues
where it stopped.

    python -m scripts.studies.recipe_study --text FILE --out scripts/results/recipe.json
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scripts.studies import search_study
from scripts.studies.fixed_heads import BASE
from scripts.studies.recovery_study import FIRST, TRAIN, pruned_model, stages, tables, trained_back
from scripts.studies.search_study import STREAMED
from scripts.studies.studies import Study
from scripts.studies.summaries import rows_and_gaps
from scripts.studies.trainings import Corpus, run_training_study, yardstick
from scripts.tools.script_line import one_line
from structprune.models.denormals import flushed_denormals

RATIOS = ["0.5", "0.7"]
RANKED, SEARCHED = "ranked widths", "searched widths"
SEARCHES = {
    "0.5": search_study.VARIANTS[search_study.LONG], "0.7": search_study.VARIANTS[search_study.SEARCHED],
}  # fmt: skip
TRAININGS = {"0.5": FIRST, "0.7": FIRST | {"train.learning_rate": 1e-3}}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {  # ratio -> changes of the pruning, keys of the training
    RANKED: {ratio: {"pruning": {}, "training": None} for ratio in RATIOS},
    SEARCHED: {ratio: {"pruning": SEARCHES[ratio], "training": None} for ratio in RATIOS},
    f"{SEARCHED}, trained": {
        ratio: {"pruning": SEARCHES[ratio], "training": TRAININGS[ratio]} for ratio in RATIOS
    },
    f"{RANKED}, trained": {ratio: {"pruning": {}, "training": TRAININGS[ratio]} for ratio in RATIOS},
}  # fmt: skip
CONTRASTS = [
    (SEARCHED, RANKED),
    (f"{RANKED}, trained", RANKED),
    (f"{SEARCHED}, trained", SEARCHED),
    (f"{SEARCHED}, trained", f"{RANKED}, trained"),
]
TOKENS = 1_500_000


@flushed_denormals()  # before anything is computed, for all threads
def measure(name: str, seed: int, windows: int, length: int, corpus: Corpus, threads: int) -> dict:
    """One variant at one seed: for each ratio loss, what generation keeps, and how long the training took."""
    torch.set_num_threads(threads)
    texts, results = yardstick(seed, windows, length), {}
    for ratio in RATIOS:
        variant = VARIANTS[name][ratio]
        with tempfile.TemporaryDirectory() as folder:
            changes = tuple(sorted(variant["pruning"].items()))
            checkpoint, seconds = Path(pruned_model(seed, ratio, changes).name) / "pruned", 0.0
            if variant["training"] is not None:
                keys = stages(variant["training"], corpus.tokens) | {"data.source": str(corpus.path)}
                checkpoint, seconds = trained_back(checkpoint, Path(folder) / "recovered", seed, keys)
            results[ratio] = texts.measure(checkpoint) | {"seconds": seconds}
    return texts.row(name, results)


def summarise(runs: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, as plain data."""
    dense = [runs[RANKED, seed]["dense"] for seed in seeds]
    return rows_and_gaps(VARIANTS, CONTRASTS, RATIOS, runs, seeds) | {"dense": dense}


STUDY = Study(
    "recipe_study", __doc__.splitlines()[0], "scripts/results/recipe.json", BASE | STREAMED, RATIOS, VARIANTS,
    measure, summarise, tables, 130,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    changes = {"windows": 384, "tokens": TOKENS}
    return one_line(STUDY.name, partial(run_training_study, STUDY, arguments, TRAIN, "of a training", changes))


if __name__ == "__main__":
    sys.exit(main())
