"""What training back is worth on the embedded model: objectives, stages and what is trained, at equal tokens.

Every variant trains the same pruned model of a seed and ratio on the same text, with the noise of one order, and is
measured on held-out text under common noise: the loss of NELBO against dense, and what greedy generation keeps. Only
"from scratch" starts from new weights, in the same shape. Intervals are over seeds (see studies.py). An interrupted
study continues where it stopped.

    python -m scripts.studies.recovery_study --out scripts/results/recovery.json
"""

import sys
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.table import Table

from scripts.studies.fixed_heads import BASE, HEADS
from scripts.studies.search_study import STREAMED
from scripts.studies.studies import Study, cell
from scripts.studies.summaries import rows_and_gaps
from scripts.studies.trainings import Corpus, run_training_study, yardstick
from scripts.tools.script_line import one_line
from structprune.assets import model_directory
from structprune.checkpoint.save import save_pruned
from structprune.config import Config
from structprune.models.denormals import flushed_denormals
from structprune.models.loading import load_model
from structprune.recovery.settings import RecoverConfig
from structprune.runs.pruner import Pruner
from structprune.runs.recover import recover

RATIOS = ["0.5", "0.7"]
TRAIN = {
    "model.device": "cpu", "data.length": 128, "data.held_out": 32, "train.method": "full",
    "train.learning_rate": 5e-4, "train.batch": 8, "train.pass_windows": 8, "train.evaluations": 4,
}  # fmt: skip
UNTRAINED, OURS, BLOCKS, SCRATCH = "not trained", "divergence", "block-wise first", "from scratch"
LONG = f"{BLOCKS}, nine times the tokens"  # four minutes on two cores
FIRST = {"blocks.tokens": 0.4, "blocks.learning_rate": 5e-3}
VARIANTS: dict[str, dict] = {
    UNTRAINED: {},
    OURS: {},
    "cross-entropy": {"loss.kl": 0.0, "loss.cross_entropy": 1.0},
    "both, half each": {"loss.kl": 0.5, "loss.cross_entropy": 0.5},
    "divergence by 1 / p": {"loss.weighting": "nelbo"},
    "moving target from 0.3": {"loss.teacher_share": 0.3},
    BLOCKS: FIRST,
    "LoRA of rank 32": {"train.method": "lora", "train.rank": 32, "train.alpha": 64.0, "train.learning_rate": 3e-3},
    SCRATCH: {"loss.kl": 0.0, "loss.cross_entropy": 1.0, "train.learning_rate": 3e-3},
    LONG: FIRST,
}
CONTRASTS = [(OURS, UNTRAINED), *((name, OURS) for name in VARIANTS if name not in (UNTRAINED, OURS, LONG))]
CONTRASTS += [(LONG, BLOCKS)]
SHARED = "blocks.tokens"  # of a variant: its first stage's share of the tokens
TIMES = {LONG: 9}  # so many times the tokens of the others
FIGURES = ("tokens_kept", "generated_nelbo", "seconds")


@lru_cache(maxsize=len(RATIOS))
def pruned_model(seed: int, ratio: str, changes: tuple[tuple[str, Any], ...] = ()) -> tempfile.TemporaryDirectory:
    """The embedded model, pruned by the recipe, in a folder that is removed with its last user.

    Args:
        changes: of the recipe, keys and values.
    """
    folder = tempfile.TemporaryDirectory()
    keys = {"calibration.seed": seed, "structured.ratio": float(ratio), "structured.split": HEADS[ratio]}
    model, recipe = load_model(model_directory(), device="cpu"), BASE | STREAMED | dict(changes)
    Pruner(model, Config.load(overrides=recipe | keys)).prune().save(Path(folder.name) / "pruned")
    return folder


def trained_back(checkpoint: Path, out: Path, seed: int, keys: dict) -> tuple[Path, float]:
    """The checkpoint trained back against the embedded model, with the study's keys under these; seconds that took."""
    config = RecoverConfig.load(overrides=TRAIN | {"data.seed": seed} | keys)
    report = recover(str(checkpoint), str(model_directory()), out, config).report
    return out, report["learnt"]["seconds"] + (report["blocks"]["seconds"] if report["blocks"] else 0.0)


def new_weights(checkpoint: Path, out: Path, seed: int) -> Path:
    """Write a model of the same shape and tokenizer, with weights as they are before any training."""
    model = load_model(checkpoint, device="cpu")
    torch.manual_seed(seed)
    fresh = type(model)(model.config)
    fresh.source = model.source
    return save_pruned(fresh, out)


def stages(variant: dict, tokens: int) -> dict:
    """The keys of a variant's training on so many tokens in both stages together."""
    first = round(variant.get(SHARED, 0) * tokens)
    return variant | ({SHARED: first} if first else {}) | {"train.tokens": tokens - first}


@flushed_denormals()  # before anything is computed, for all threads
def measure(name: str, seed: int, windows: int, length: int, corpus: Corpus, threads: int) -> dict:
    """One variant at one seed: for each ratio loss, what generation keeps, and how long the training took."""
    torch.set_num_threads(threads)
    texts, results = yardstick(seed, windows, length), {}
    with tempfile.TemporaryDirectory() as folder:
        for ratio in RATIOS:
            checkpoint, seconds = Path(pruned_model(seed, ratio).name) / "pruned", 0.0
            if name == SCRATCH:
                checkpoint = new_weights(checkpoint, Path(folder) / f"new-{ratio}", seed)
            if name != UNTRAINED:
                keys = stages(VARIANTS[name], corpus.tokens * TIMES.get(name, 1)) | {"data.source": str(corpus.path)}
                checkpoint, seconds = trained_back(checkpoint, Path(folder) / f"recovered-{ratio}", seed, keys)
            results[ratio] = texts.measure(checkpoint) | {"seconds": seconds}
    return texts.row(name, results)


def summarise(runs: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, as plain data."""
    dense = [runs[OURS, seed]["dense"] for seed in seeds]
    return rows_and_gaps(VARIANTS, CONTRASTS, RATIOS, runs, seeds) | {"dense": dense}


def tables(result: dict) -> list[Table]:
    """For each ratio what every variant loses and keeps."""
    return [_table(result, ratio) for ratio in dict.fromkeys(row["ratio"] for row in result["losses"])]


def _table(result: dict, ratio: str) -> Table:
    table = Table(title=f"At {ratio}: loss of NELBO, nats per token [95% interval over seeds], and generation")
    for title in ("variant", "loss", "tokens kept", "NELBO of generated", "seconds"):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for row in (row for row in result["losses"] if row["ratio"] == ratio):
        share, nelbo, seconds = (fmean(row[key]) for key in FIGURES)
        table.add_row(row["variant"], cell(row), f"{100 * share:.1f} %", f"{nelbo:.2f}", f"{seconds:.0f}")
    return table


STUDY = Study(
    "recovery_study", __doc__.splitlines()[0], "scripts/results/recovery.json", BASE | STREAMED, RATIOS, VARIANTS,
    measure, summarise, tables, 130,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    return one_line(STUDY.name, partial(run_training_study, STUDY, arguments, TRAIN, "of a training"))


if __name__ == "__main__":
    sys.exit(main())
