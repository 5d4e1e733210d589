"""What calibration and refit are worth, one factor at a time, with the same number of heads gone in every run.

Distinct text against noisy copies of it, targets of the refit, and how many weights are refitted. All variants of a
seed and ratio remove the same number of heads, so that the measured split, which reacts to all of them, decides
nothing. Intervals are over seeds (see studies.py). An interrupted study continues where it stopped.

    python -m scripts.studies.factor_study --out scripts/results/factors.json
"""

import sys

import torch
from rich.table import Table

from scripts.studies.studies import CALIBRATION, Study, cell, contrast_row, held_out_text, loss_row, main
from structprune.assets import model_directory
from structprune.config import Config
from structprune.models.loading import load_model
from structprune.runs.pruner import Pruner

# attention steps gone by ratio: about what the measured split takes (see quality.json)
HEADS = {"0.3": 2, "0.5": 14, "0.7": 22}
PRODUCERS, MIXED = {"reconstruct.producers": True}, {"reconstruct.target": "mixed"}
HEAD, VISIBLE = {"reconstruct.head": True}, {"reconstruct.visible": 0.5}


def rows_of(windows: int, copies: int) -> dict:
    """Keys of a calibration of so many windows and copies of each: 40 held-out sequences, 20 sequences in a pass."""
    sizes = {"windows": windows, "copies": copies, "held_out": 40 // copies, "batch": 20 // copies}
    return {f"calibration.{name}": size for name, size in sizes.items()}


MANY = rows_of(160, 1)
BASE = CALIBRATION | {"structured.arm": "masked"}
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


def measure(name: str, seed: int, windows: int, length: int, threads: int) -> dict:
    """One variant at one seed: for each ratio the loss per held-out window, and the seconds of the run."""
    torch.set_num_threads(threads)
    model, results = load_model(model_directory(), device="cpu"), {}
    held_out = held_out_text(model, seed, windows, length)
    for ratio, heads in HEADS.items():
        keys = {"calibration.seed": seed, "structured.ratio": float(ratio), "structured.split": heads}
        pruned = Pruner(model, Config.load(overrides=BASE | keys | VARIANTS[name])).prune()
        results[ratio] = {
            "loss": held_out.loss(pruned.model),
            "seconds": pruned.report["seconds"]["total"],
            "kept": pruned.report["held_out_nelbo"]["kept"],
        }
    return {"variant": name, "seed": seed, "dense_nelbo": held_out.dense.mean, "ratios": results}


def summarise(runs: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, as plain data."""
    rows, gaps = [], []
    for ratio in HEADS:
        for name in VARIANTS:
            results = [runs[name, seed]["ratios"][ratio] for seed in seeds]
            lists = {key: [result[key] for result in results] for key in ("seconds", "kept")}
            rows.append({"variant": name, "ratio": ratio, **loss_row(runs, name, seeds, ratio), **lists})
        for name, base in CONTRASTS:
            gap = contrast_row(runs, (name, ratio), (base, ratio), seeds)
            gaps.append({"variant": name, "against": base, "ratio": ratio, **gap})
    return {"losses": rows, "contrasts": gaps, "heads": HEADS}


def tables(result: dict) -> list[Table]:
    """Losses, and paired differences: a row per variant, a column per ratio."""
    return heads_tables(result, list(HEADS))


def heads_tables(result: dict, ratios: list[str]) -> list[Table]:
    """The tables of a study whose variants begin with the same number of heads gone."""
    results = []
    for key, title in (("losses", "loss of NELBO against dense, nats per token"), ("contrasts", "paired difference")):
        table = Table(title=f"{title} [95% interval over seeds]; * excludes 0, all seeds agree")
        table.add_column("variant")
        for ratio in ratios:
            table.add_column(ratio, justify="right")
        by_name: dict[str, list[str]] = {}
        for row in result[key]:
            name = f"{row['variant']} - {row['against']}" if "against" in row else row["variant"]
            by_name.setdefault(name, []).append(cell(row, "against" in row))
        for name, cells in by_name.items():
            table.add_row(name, *cells)
        results.append(table)
    return results


STUDY = Study(
    "factor_study", __doc__.splitlines()[0], "scripts/results/factors.json", BASE, list(HEADS), VARIANTS, measure,
    summarise, tables,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STUDY))
