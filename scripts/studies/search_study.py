"""What the rest of the refit and a search for widths are worth on the embedded model, one step after another.

All variants of a seed and ratio start from the same number of heads gone, so that the measured split decides nothing; a
search then moves heads and channels freely. Intervals are over seeds (see studies.py). An interrupted study continues
where it stopped.

    python -m scripts.studies.search_study --out scripts/results/search.json
"""

import sys

import torch

from scripts.studies.factor_study import BASE, HEAD, HEADS, MANY, PRODUCERS, VISIBLE, heads_tables, rows_of
from scripts.studies.studies import Study, contrast_row, held_out_text, loss_row, main
from structprune.assets import model_directory
from structprune.config import Config
from structprune.models.loading import load_model
from structprune.runs.demo import HeldOut
from structprune.runs.pruned import Pruned
from structprune.runs.pruner import Pruner

RATIOS = ["0.5", "0.7"]
SEARCH = {"search.enabled": True, "search.sequences": 40}
REFIT = MANY | PRODUCERS | HEAD | VISIBLE
LONG = rows_of(480, 1) | PRODUCERS | HEAD | VISIBLE
VARIANTS = {
    "today's recipe": MANY,
    "producers": MANY | PRODUCERS,
    "producers, head": MANY | PRODUCERS | HEAD,
    "producers, visible 0.5": MANY | PRODUCERS | VISIBLE,
    "whole refit": REFIT,
    "whole refit, knapsack": REFIT | SEARCH | {"search.method": "knapsack"},
    "480 windows, whole refit, knapsack": LONG | SEARCH | {"search.method": "knapsack"},
}
CONTRASTS = [
    ("producers", "today's recipe"),
    ("producers, head", "producers"),
    ("producers, visible 0.5", "producers"),
    ("whole refit", "producers"),
    ("whole refit", "today's recipe"),
    ("whole refit, knapsack", "whole refit"),
    ("480 windows, whole refit, knapsack", "whole refit, knapsack"),
    ("480 windows, whole refit, knapsack", "today's recipe"),
]


def measure(name: str, seed: int, windows: int, length: int, threads: int) -> dict:
    """One variant at one seed: for each ratio the loss per held-out window, and the seconds of run and search."""
    torch.set_num_threads(threads)
    model, results = load_model(model_directory(), device="cpu"), {}
    held_out = held_out_text(model, seed, windows, length)
    for ratio in RATIOS:
        keys = {"calibration.seed": seed, "structured.ratio": float(ratio), "structured.split": HEADS[ratio]}
        pruned = Pruner(model, Config.load(overrides=BASE | keys | VARIANTS[name])).prune()
        report = pruned.report
        results[ratio] = loss_and_time(held_out, pruned) | {
            "kept": (report["search"] or {"kept": None})["kept"],
            "heads": sum(report["choice"]["attention"]),
        }
    return {"variant": name, "seed": seed, "dense_nelbo": held_out.dense.mean, "ratios": results}


def loss_and_time(held_out: HeldOut, pruned: Pruned) -> dict:
    """The loss per held-out window, and the seconds of the run and of its search."""
    seconds = pruned.report["seconds"]
    return {
        "loss": held_out.loss(pruned.model),
        "seconds": seconds["total"],
        "search_seconds": seconds.get("search", 0.0),
    }


def summarise(runs: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, as plain data."""
    rows, gaps = [], []
    for ratio in RATIOS:
        for name in VARIANTS:
            results = [runs[name, seed]["ratios"][ratio] for seed in seeds]
            lists = {key: [result[key] for result in results] for key in results[0] if key != "loss"}
            rows.append({"variant": name, "ratio": ratio, **loss_row(runs, name, seeds, ratio), **lists})
        for name, base in CONTRASTS:
            gap = contrast_row(runs, (name, ratio), (base, ratio), seeds)
            gaps.append({"variant": name, "against": base, "ratio": ratio, **gap})
    return {"losses": rows, "contrasts": gaps, "heads": {ratio: HEADS[ratio] for ratio in RATIOS}}


def tables(result: dict):
    """Losses, and paired differences: a row per variant, a column per ratio."""
    return heads_tables(result, RATIOS)


STUDY = Study(
    "search_study", __doc__.splitlines()[0], "scripts/results/search.json", BASE, RATIOS, VARIANTS, measure,
    summarise, tables,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STUDY))
