"""What a gradual schedule is worth on the embedded model, against one shot at equal tokens.

At every ratio both variants read the same windows in the same order, and learn from the dense model. One shot prunes to
the ratio and then learns from all tokens; the gradual one prunes at 0.3 first, goes on through the ratios up to it, and
learns from an equal part after each. Both are measured on held-out text under common noise: the loss of NELBO against
dense, and what greedy generation keeps. Intervals are over seeds (see studies.py). An interrupted study continues where
it stopped.

    python -m scripts.studies.gradual_study --out scripts/results/gradual.json
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from rich.table import Table

from scripts.studies.fixed_heads import BASE
from scripts.studies.recovery_study import TRAIN
from scripts.studies.search_study import STREAMED
from scripts.studies.studies import Study, cell
from scripts.studies.summaries import rows_and_gaps
from scripts.studies.trainings import Corpus, run_training_study, yardstick
from scripts.tools.script_line import one_line
from structprune.assets import model_directory, text_file
from structprune.config import Config
from structprune.models.denormals import flushed_denormals
from structprune.recovery.settings import RecoverConfig
from structprune.runs.gradual import Step, prune_and_recover
from structprune.runs.schedule import Schedule

RATIOS = ["0.5", "0.7"]
ONCE, GRADUAL = "one shot", "gradual"
VARIANTS: dict[str, dict[str, tuple[float, ...]]] = {  # ratio -> what is pruned and trained back one after another
    ONCE: {"0.5": (0.5,), "0.7": (0.7,)},
    GRADUAL: {"0.5": (0.3, 0.5), "0.7": (0.3, 0.5, 0.7)},
}
CONTRASTS = [(GRADUAL, ONCE)]
PRUNE = {"model.device": "cpu"}  # the split is measured at every ratio: a number of heads would go anew at each
FIGURES = ("tokens_kept", "generated_nelbo", "seconds")


def schedule_of(name: str, ratio: str, seed: int, corpus: Corpus) -> Schedule:
    """The schedule of a variant that ends at a ratio."""
    ratios, text = VARIANTS[name][ratio], str(text_file("calibration.txt"))
    config = BASE | STREAMED | PRUNE | {"calibration.seed": seed, "calibration.source": text}
    training = TRAIN | {"data.seed": seed, "train.tokens": corpus.tokens, "data.source": str(corpus.path)}
    return Schedule(
        Config.load(overrides=config), RecoverConfig.load(overrides=training), ratios, gradual=len(ratios) > 1
    )


@flushed_denormals()  # before anything is computed, for all threads
def measure(name: str, seed: int, windows: int, length: int, corpus: Corpus, threads: int) -> dict:
    """One variant at one seed: for each ratio loss, what generation keeps, what was removed, and the time of all."""
    torch.set_num_threads(threads)
    texts, results = yardstick(seed, windows, length), {}
    for ratio in RATIOS:
        with tempfile.TemporaryDirectory() as folder:
            steps = prune_and_recover(
                str(model_directory()), Path(folder) / "out", schedule_of(name, ratio, seed, corpus)
            )
            results[ratio] = texts.measure(steps[-1].directory) | figures(steps)
    return texts.row(name, results)


def figures(steps: list[Step]) -> dict:
    """Of a schedule: the share of the dense model that is gone, tokens learnt, and seconds of pruning and training."""
    trainings = [each for step in steps for each in step.report["recoveries"]]
    pruning = sum(step.report["seconds"]["total"] for step in steps)
    return {
        "removed": steps[-1].report["ratio_of_dense"],
        "tokens": sum(each["tokens"] for each in trainings),
        "seconds": pruning + sum(each["learnt"]["seconds"] for each in trainings),
    }


def summarise(runs: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, as plain data."""
    dense = [runs[ONCE, seed]["dense"] for seed in seeds]
    return rows_and_gaps(VARIANTS, CONTRASTS, RATIOS, runs, seeds) | {"dense": dense}


def tables(result: dict) -> list[Table]:
    """What either way loses and keeps at every ratio, and the paired difference."""
    table = Table(title="Loss of NELBO, nats per token [95% interval over seeds], and generation")
    for title in ("ratio", "variant", "loss", "removed", "tokens kept", "NELBO of generated", "seconds"):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for row in result["losses"]:
        share, nelbo, seconds = (fmean(row[key]) for key in FIGURES)
        removed = f"{100 * fmean(row['removed']):.1f} %"
        cells = (removed, f"{100 * share:.1f} %", f"{nelbo:.2f}", f"{seconds:.0f}")
        table.add_row(row["ratio"], row["variant"], cell(row), *cells)
    for row in result["contrasts"]:
        table.add_row(row["ratio"], f"{row['variant']} - {row['against']}", cell(row, paired=True))
    return [table]


STUDY = Study(
    "gradual_study", __doc__.splitlines()[0], "scripts/results/gradual.json", BASE | STREAMED | PRUNE, RATIOS, VARIANTS,
    measure, summarise, tables, 130,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    return one_line(STUDY.name, partial(run_training_study, STUDY, arguments, TRAIN, "of a whole schedule"))


if __name__ == "__main__":
    sys.exit(main())
