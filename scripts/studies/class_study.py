"""What equal blocks cost on the embedded model, and what a search that drops whole blocks gets back.

Export classes `free` (any widths), `uniform` (one width everywhere) and `official` (all heads stay too), with the same
calibration and refit, each without and with a search: for widths, or for blocks to drop. How many heads go is measured
in each run. `official` is not tried where the MLPs are not enough. Every pruned model is timed in turns with the dense
one. Intervals are over seeds (see studies.py). An interrupted study continues where it stopped.

    taskset -c 0 python -m scripts.studies.class_study --out scripts/results/class.json

Also draws class_pareto.png beside --out: loss against latency.
"""

import sys
from pathlib import Path
from statistics import median

import torch

from scripts.studies.factor_study import MANY, PRODUCERS
from scripts.studies.fixed_heads import BASE, loss_and_time, tables
from scripts.studies.studies import (
    Study,
    contrast_row,
    held_out_text,
    loss_row,
    parse_options,
    run_study,
    seed_interval,
    study_parser,
)
from scripts.tools.script_line import one_line
from structprune.assets import model_directory
from structprune.bench.latency import Timing, measure_latency, quartiles
from structprune.config import Config
from structprune.models.checkpoint_files import read_json
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.report.plots import (
    COLOURS,
    GREY,
    MARKERS,
    SIZE,
    check_matplotlib,
    hide_frame,
    pyplot_for_files,
    save_figure,
)
from structprune.runs.pruner import Pruner

RATIOS = ["0.3", "0.5", "0.7"]
REFIT = MANY | PRODUCERS
UNIFORM = {"structured.allocation": "uniform", "export.compat": "uniform"}
OFFICIAL = UNIFORM | {"structured.split": 0, "export.compat": "official"}
SEARCH = {"search.enabled": True, "search.sequences": 40}
VARIANTS = {
    "free": REFIT,
    "free, search": REFIT | SEARCH | {"search.method": "knapsack"},
    "uniform": REFIT | UNIFORM,
    "uniform, search": REFIT | UNIFORM | SEARCH,
    "official": REFIT | OFFICIAL,
    "official, search": REFIT | OFFICIAL | SEARCH,
}
CONTRASTS = [
    ("uniform", "free"),
    ("official", "free"),
    ("free, search", "free"),
    ("uniform, search", "uniform"),
    ("official, search", "official"),
    ("uniform, search", "free"),
    ("official, search", "free"),
    ("uniform, search", "free, search"),
    ("official, search", "free, search"),
]
PASSES, LENGTH = 60, 128  # timed forward passes of each model; tokens of one


def ratios_of(name: str) -> list[str]:
    """The ratios that a variant can meet: all heads together are a third of the block projections."""
    return [ratio for ratio in RATIOS if not name.startswith("official") or float(ratio) < 0.6]


def measure(name: str, seed: int, windows: int, length: int, threads: int) -> dict:
    """One variant at one seed: the loss per held-out window, what is left, and how long a forward pass takes."""
    torch.set_num_threads(threads)
    model, results = load_model(model_directory(), device="cpu"), {}
    held_out = held_out_text(model, seed, windows, length)
    pruner = Pruner(model, Config.load(overrides=BASE | {"calibration.seed": seed} | VARIANTS[name]))
    for ratio in ratios_of(name):
        pruned = pruner.prune(float(ratio))
        report = pruned.report
        results[ratio] = loss_and_time(held_out, pruned) | {
            "search": report["search"],
            "dropped": report["removed"]["blocks"],
            "widths": report["widths"],
            "export_class": report["export_class"],
            "removed": report["ratio"],
            "macs": report["macs"],
            "latency": timed(model, pruned.model),
        }
    return {"variant": name, "seed": seed, "dense_nelbo": held_out.dense.mean, "ratios": results}


def timed(dense: DiffusionLM, pruned: DiffusionLM) -> dict:
    """Milliseconds of a forward pass of one sequence, and of the pruned model as a share of the dense one's, round by
    round: medians with quartiles."""
    measured = measure_latency({"dense": dense, "pruned": pruned}, LENGTH, timing=Timing(rounds=PASSES))
    share = measured["pruned"].tensor() / measured["dense"].tensor()  # (rounds,)
    return {name: each.quartiles_ms() for name, each in measured.items()} | {"share": quartiles(share)}


def summarise(runs: dict, seeds: list[int]) -> dict:
    """Mean losses, paired contrasts with 95% intervals over seeds, and the share of the gap to `free` that is got back.

    Returns:
        Plain data; `latency` of a row has the medians over seeds of the shares and of their quartiles.
    """
    rows, gaps, shares = [], [], []
    for ratio in RATIOS:
        names = [name for name in VARIANTS if ratio in ratios_of(name)]
        for name in names:
            results = [runs[name, seed]["ratios"][ratio] for seed in seeds]
            lists = {key: [result[key] for result in results] for key in results[0] if key != "loss"}
            sides = [result["latency"]["share"] for result in results]
            share = {side: median(each[side] for each in sides) for side in sides[0]}
            row = {"variant": name, "ratio": ratio, **loss_row(runs, name, seeds, ratio), **lists}
            rows.append(row | {"latency_share": share})
        for name, base in (pair for pair in CONTRASTS if set(pair) <= set(names)):
            gap = contrast_row(runs, (name, ratio), (base, ratio), seeds)
            gaps.append({"variant": name, "against": base, "ratio": ratio, **gap})
        means = {row["variant"]: row["by_seed"] for row in rows if row["ratio"] == ratio}
        for name in (name for name in names if name.endswith(", search") and not name.startswith("free")):
            triples = zip(means[name.removesuffix(", search")], means[name], means["free"])
            back = [(before - after) / (before - free) for before, after, free in triples]
            shares.append({"variant": name, "ratio": ratio, **seed_interval(back)})
    return {"losses": rows, "contrasts": gaps, "gap_closed": shares}


def draw(result: dict, path: Path) -> Path:
    """Loss against the latency of a forward pass: a line through the ratios for every variant, points for its seeds.

    Args:
        result: the contents of class.json.
        path: PNG to write.
    """
    figure, axes = pyplot_for_files().subplots(figsize=SIZE, layout="constrained")
    looks = dict(zip((name for name in VARIANTS if "search" not in name), zip(COLOURS, MARKERS)))
    for name in VARIANTS:
        (colour, marker), searched = looks[name.removesuffix(", search")], name.endswith("search")
        rows = [row for row in result["losses"] if row["variant"] == name]
        places = [row["latency_share"]["median"] for row in rows]
        for row in rows:
            x = [each["share"]["median"] for each in row["latency"]]
            axes.scatter(x, row["by_seed"], s=12, color=colour, alpha=0.4, linewidths=0)
        axes.plot(
            places, [row["mean"] for row in rows], color=colour, marker=marker, markersize=6, linewidth=1.2, label=name,
            linestyle="-" if searched else ":", markerfacecolor=colour if searched else "white",
        )  # fmt: skip
        if name == "free":
            for row, place in zip(rows, places):
                label = (place, row["mean"])
                axes.annotate(row["ratio"], label, (-20, -12), textcoords="offset points", color=GREY, fontsize=9)
    axes.set(xlabel="latency of a forward pass, share of the dense model's", ylabel="loss of NELBO, nats per token")
    axes.set_yscale("log")
    axes.set_title("Loss and latency by export class, at 0.3, 0.5 and 0.7 of the block projections", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    hide_frame(axes)
    return save_figure(figure, path, 160)


STUDY = Study(
    "class_study", __doc__.splitlines()[0], "scripts/results/class.json", BASE, RATIOS, VARIANTS, measure, summarise,
    tables,
)  # fmt: skip


def run(arguments: list[str] | None = None) -> None:
    """The study, and its picture from the JSON that it wrote."""
    options = parse_options(study_parser(STUDY), arguments)
    check_matplotlib()
    run_study(STUDY, options)
    result = read_json(options.out, "run the study anew")
    print(f"Wrote {draw(result, options.out.with_name(f'{options.out.stem}_pareto.png'))}")


if __name__ == "__main__":
    sys.exit(one_line(STUDY.name, run))
