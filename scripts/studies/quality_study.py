"""The effect of each choice of the recipe on the embedded model: scores, refit, sinks, split and target, over seeds.

Every variant prunes the embedded model at each ratio and seed. Its loss of NELBO against the dense model is measured on
held-out text under noise that all variants of a seed share, so that differences are paired. Intervals are over seeds
(see studies.py). An interrupted study continues where it stopped.

    python -m scripts.studies.quality_study --out scripts/results/quality.json
"""

import sys

import torch
from rich.table import Table

from scripts.studies.studies import CALIBRATION, CONSUMERS, Study, cell, contrast_row, held_out_text, loss_row, main
from structprune.assets import model_directory
from structprune.config import Config
from structprune.models.loading import load_model
from structprune.runs.pruner import Pruner

BASE = CALIBRATION | CONSUMERS | {
    "calibration.windows": 40, "structured.split_windows": 12, "structured.split_candidates": 6,
    "structured.arm": "masked",
}  # fmt: skip
RATIOS = (0.3, 0.5)
EQUAL = {"structured.split": "equal", "structured.allocation": "uniform"}
LAYER = {"reconstruct.target": "layer"}
PLAIN = "obs, masked, refit"  # each ablation changes one thing of it


def variants() -> dict[str, dict]:
    """Name -> configuration keys that differ from `BASE`."""
    grid: dict[str, dict] = {
        f"{score}, {arm}, {'refit' if refit else 'no refit'}": {
            "structured.score": score, "structured.arm": arm, "reconstruct.enabled": refit,
        }
        for score in ("wanda", "fluctuation", "obs") for arm in ("masked", "masked+sink") for refit in (True, False)
    }  # fmt: skip
    ablations: dict[str, dict] = {
        "refit on masked+sink": {"reconstruct.arm": "masked+sink"},
        "refit on clean": {"reconstruct.arm": "clean"},
        "split equal": {"structured.split": "equal"},
        "split by-cost": {"structured.split": "by-cost"},
        "split joint": {"structured.split": "joint"},
        "target layer": LAYER,
        "split equal, target layer": {"structured.split": "equal"} | LAYER,
        "split by-cost, target layer": {"structured.split": "by-cost"} | LAYER,
        "allocation uniform": {"structured.allocation": "uniform"},
        "allocation depth": {"structured.allocation": "depth"},
        "allocation uniform, split equal": EQUAL,
        "wanda, uniform, equal, no refit": {"structured.score": "wanda", "reconstruct.enabled": False} | EQUAL,
        "rows not relative": {"structured.relative": False, "reconstruct.relative": False},
        "constant feature": {"reconstruct.constant": True},
    }
    return grid | ablations


def contrasts() -> list[tuple[str, str]]:
    """(variant, variant it is compared with): sinks in the scores, then every ablation."""
    names = list(variants())
    sinks = [(name, name.replace("masked+sink", "masked")) for name in names if ", masked+sink," in name]
    return sinks + [(name, PLAIN) for name in names if not name.startswith(("wanda", "fluctuation", "obs"))]


def measure(name: str, seed: int, windows: int, length: int, threads: int) -> dict:
    """One variant at one seed: for each ratio the loss per held-out window, and the split of units."""
    torch.set_num_threads(threads)
    config = Config.load(overrides=BASE | {"calibration.seed": seed} | variants()[name])
    model = load_model(model_directory(), device="cpu")
    held_out = held_out_text(model, seed, windows, length)
    pruner, results = Pruner(model, config), {}
    for ratio in RATIOS:
        pruned = pruner.prune(ratio)
        results[str(ratio)] = {
            "loss": held_out.loss(pruned.model),
            "heads_removed": sum(pruned.report["choice"]["attention"]),
            "ratio_met": pruned.report["ratio"],
            "kept": pruned.report["held_out_nelbo"]["kept"],
        }
    return {"variant": name, "seed": seed, "dense_nelbo": held_out.dense.mean, "ratios": results}


def summarise(runs: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, as plain data."""
    rows, gaps = [], []
    for name in variants():
        for ratio in RATIOS:
            results = [runs[name, seed]["ratios"][str(ratio)] for seed in seeds]
            lists = {key: [result[key] for result in results] for key in ("heads_removed", "kept")}
            rows.append({"variant": name, "ratio": ratio, **loss_row(runs, name, seeds, str(ratio)), **lists})
    for name, base in contrasts():
        for ratio in RATIOS:
            gap = contrast_row(runs, (name, str(ratio)), (base, str(ratio)), seeds)
            gaps.append({"variant": name, "against": base, "ratio": ratio, **gap})
    return {"losses": rows, "contrasts": gaps}


def tables(result: dict) -> list[Table]:
    """Losses and contrasts, a row per variant."""
    results = []
    titles = {
        "losses": "loss of NELBO against dense, nats per token",
        "contrasts": "paired difference; * excludes 0, all seeds agree",
    }
    for key, title in titles.items():
        table = Table(title=title)
        table.add_column("variant")
        if key == "contrasts":
            table.add_column("against")
        for ratio in RATIOS:
            table.add_column(f"{ratio}: mean [95% interval over seeds]", justify="right")
            if key == "losses":
                table.add_column("heads removed", justify="right")
        names = dict.fromkeys((row["variant"], row.get("against")) for row in result[key])
        for name, base in names:
            cells = [name] if base is None else [name, base]
            for row in (row for row in result[key] if (row["variant"], row.get("against")) == (name, base)):
                cells.append(cell(row, paired=base is not None))
                if base is None:
                    cells.append(", ".join(map(str, row["heads_removed"])))
            table.add_row(*cells)
        results.append(table)
    return results


STUDY = Study(
    "quality_study", __doc__.splitlines()[0], "scripts/results/quality.json", BASE, list(RATIOS), variants(), measure,
    summarise, tables,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STUDY))
