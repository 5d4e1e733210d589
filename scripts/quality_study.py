"""What each choice of the recipe is worth on the embedded model: scores, refit, sinks, split and target, over seeds.

Every variant prunes the embedded model at each ratio and seed; its loss of NELBO against the dense model is measured on
held-out text under noise that all variants of a seed share, so that differences are paired. A killed study goes on
where it stopped.

    python scripts/quality_study.py --out scripts/results/quality.json
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from studies import HeldOut, add_options, contrast_row, loss_row, run_all, write_result

from structprune.assets import model_directory
from structprune.bench.machine import describe_machine
from structprune.config import Config
from structprune.demo import BASE as DEMO
from structprune.models.loading import load_model
from structprune.pipeline import Pruner

BASE = DEMO | {"calibration.windows": 40, "structured.arm": "masked"}
RATIOS = (0.3, 0.5)
EQUAL = {"structured.split": "equal", "structured.allocation": "uniform"}
LAYER = {"reconstruct.target": "layer"}
PLAIN = "obs, masked, refit"  # what the ablations change one thing of


def variants() -> dict[str, dict]:
    """Name -> configuration keys that differ from the demo's."""
    grid = {
        f"{score}, {arm}, {'refit' if refit else 'no refit'}": {
            "structured.score": score, "structured.arm": arm, "reconstruct.enabled": refit,
        }
        for score in ("wanda", "fluctuation", "obs") for arm in ("masked", "masked+sink") for refit in (True, False)
    }  # fmt: skip
    ablations = {
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
    """(variant, what it is compared with): sinks in the scores, then every ablation against the same without it."""
    names = list(variants())
    sinks = [(name, name.replace("masked+sink", "masked")) for name in names if ", masked+sink," in name]
    return sinks + [(name, PLAIN) for name in names if not name.startswith(("wanda", "fluctuation", "obs"))]


def measure(name: str, seed: int, windows: int, length: int, threads: int) -> dict:
    """One variant at one seed: per ratio the loss per held-out window, and how the units were split."""
    torch.set_num_threads(threads)
    config = Config.load(overrides=BASE | {"calibration.seed": seed} | variants()[name])
    model = load_model(model_directory(), device="cpu")
    held_out = HeldOut(model, seed, windows, length)
    pruner, found = Pruner(model, config), {}
    for ratio in RATIOS:
        pruned = pruner.prune(ratio)
        found[str(ratio)] = {
            "loss": held_out.loss(pruned.model),
            "heads_removed": sum(pruned.report["choice"]["attention"]),
            "ratio_met": pruned.report["ratio"],
            "kept": pruned.report["held_out_nelbo"]["kept"],
        }
    return {"variant": name, "seed": seed, "dense_nelbo": held_out.dense.mean, "ratios": found}


def summarise(done: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over all windows and seeds, as plain data."""
    rows, gaps = [], []
    for name in variants():
        for ratio in RATIOS:
            found = [done[name, seed]["ratios"][str(ratio)] for seed in seeds]
            rows.append({
                "variant": name, "ratio": ratio, **loss_row(done, name, seeds, str(ratio)),
                "heads_removed": [row["heads_removed"] for row in found], "kept": [row["kept"] for row in found],
            })  # fmt: skip
    for name, base in contrasts():
        for ratio in RATIOS:
            gap = contrast_row(done, (name, str(ratio)), (base, str(ratio)), seeds)
            gaps.append({"variant": name, "against": base, "ratio": ratio, **gap})
    return {"losses": rows, "contrasts": gaps}


def tables(result: dict) -> list[Table]:
    """Losses, and contrasts, a row per variant."""
    made = []
    for title, key in (("loss of NELBO against dense, nats per token", "losses"), ("paired difference", "contrasts")):
        table = Table(title=title)
        table.add_column("variant")
        if key == "contrasts":
            table.add_column("against")
        for ratio in RATIOS:
            table.add_column(f"{ratio}: mean [95% interval]", justify="right")
            table.add_column("heads gone" if key == "losses" else "shown", justify="right")
        names = dict.fromkeys((row["variant"], row.get("against")) for row in result[key])
        for name, base in names:
            cells = [name] if base is None else [name, base]
            for row in (row for row in result[key] if (row["variant"], row.get("against")) == (name, base)):
                cells.append(f"{row['mean']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]")
                shown = "yes" if row["low"] * row["high"] > 0 else "no"
                cells.append(shown if base else ", ".join(map(str, row["heads_removed"])))
            table.add_row(*cells)
        made.append(table)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "scripts/results/quality.json")
    options = parser.parse_args()
    seeds = list(range(options.seeds))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_suffix(".part.jsonl")
    tasks = [(name, seed, options.windows, options.length) for name in variants() for seed in seeds]
    done = run_all(measure, tasks, partial, options.jobs, Console(stderr=True))
    settings = {
        "seeds": seeds,
        "windows": options.windows,
        "length": options.length,
        "base": BASE | {"calibration.source": "calibration.txt"},
    }
    result = {"settings": settings, "machine": describe_machine(), "variants": variants(), **summarise(done, seeds)}
    write_result(result, options.out, partial)
    console = Console(width=150)
    for table in tables(result):
        console.print(table)
    console.print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
