"""Masks compared fairly on the embedded model: method x arm x ratio with the same text and common noise, over seeds.

In the published comparison, Wanda and SparseGPT see clean text, sink-Wanda noisy text, and sink-SparseGPT clean text
with sink weights. Here every method runs on all four arms, which separates the effect of masked calibration from that
of sinks. Losses of NELBO against the dense model are measured on held-out text under noise that all variants of a seed
share. Intervals are over seeds (see studies.py). An interrupted study continues where it stopped.

    python -m scripts.studies.mask_study --out scripts/results/masks.json
"""

import sys

import torch
from rich.table import Table

from scripts.studies.studies import CALIBRATION, Study, cell, contrast_row, held_out_text, loss_row, main
from structprune.assets import model_directory
from structprune.calibration.build import calibrate
from structprune.config import Config
from structprune.models.loading import load_model
from structprune.runs.mask import mask

BASE = CALIBRATION | {"method": "unstructured", "reconstruct.enabled": False}
RATIOS: dict[str, dict] = {
    "0.25": {"masking.ratio": 0.25},
    "0.5": {"masking.ratio": 0.5},
    "0.75": {"masking.ratio": 0.75},
    "2:4": {"method": "nm"},
}
SCORES = ("wanda", "ria", "sparsegpt")
ARMS = ("clean", "masked", "masked+sink", "clean+sink")
REFIT = {"reconstruct.enabled": True}
SPARSEGPT, WANDA = ({"masking.score": name, "masking.arm": "masked"} for name in ("sparsegpt", "wanda"))
PUBLISHED = {"masking.score": "sink-wanda", "masking.norms": "summed", "masking.order": "one-shot"}


def variants() -> dict[str, dict]:
    """Name -> configuration keys: the comparison first, then variants that change one thing of a masked run."""
    grid = {f"{score}, {arm}": {"masking.score": score, "masking.arm": arm} for score in SCORES for arm in ARMS}
    refits = {f"{score}, masked, refit": {"masking.score": score, "masking.arm": "masked"} | REFIT for score in SCORES}
    return {
        "magnitude": {"masking.score": "magnitude"},
        **grid,
        "sink-wanda as published": PUBLISHED,
        "magnitude, refit": {"masking.score": "magnitude"} | REFIT,
        **refits,
        "sparsegpt, masked+sink, refit": {"masking.score": "sink-sparsegpt"} | REFIT,
        "sparsegpt, masked, refit on masked+sink": SPARSEGPT | REFIT | {"reconstruct.arm": "masked+sink"},
        "sparsegpt, masked, refit on clean": SPARSEGPT | REFIT | {"reconstruct.arm": "clean"},
        "sparsegpt, masked, refit to layer": SPARSEGPT | REFIT | {"reconstruct.target": "layer"},
        "sparsegpt, masked+sink, hard": {"masking.score": "sink-sparsegpt", "sink.mask": "hard"},
        "sparsegpt, masked, one-shot": SPARSEGPT | {"masking.order": "one-shot"},
        "sparsegpt, masked, relative": SPARSEGPT | {"masking.relative": True},
        "sparsegpt, masked, owl": SPARSEGPT | {"masking.allocation": "owl"},
        "sparsegpt, masked, owl reversed": SPARSEGPT | {"masking.allocation": "owl", "masking.owl_spread": -0.08},
        "sparsegpt, masked, depth": SPARSEGPT | {"masking.allocation": "depth"},
        "sparsegpt, masked, depth reversed": SPARSEGPT | {"masking.allocation": "depth", "masking.depth_slope": -0.2},
        "wanda, masked, one-shot": WANDA | {"masking.order": "one-shot"},
        "wanda, masked, relative": WANDA | {"masking.relative": True},
        "wanda, masked, norms summed": WANDA | {"masking.norms": "summed"},
    }


def ratios_of(name: str) -> list[str]:
    """The ratios a variant can run at: an allocation varies the ratio over blocks, but N:M fixes it."""
    return [ratio for ratio in RATIOS if ratio != "2:4" or "masking.allocation" not in variants()[name]]


def contrasts() -> list[tuple[str, str, str]]:
    """(question, variant, variant it is compared with)."""
    rows = []
    for score in SCORES:
        rows.append(("masked calibration", f"{score}, masked", f"{score}, clean"))
        rows.append(("sinks, on masked text", f"{score}, masked+sink", f"{score}, masked"))
        rows.append(("sinks, on clean text", f"{score}, clean+sink", f"{score}, clean"))
    rows.append(("as published", "sink-wanda as published", "wanda, clean"))
    for name in variants():
        *rest, last = name.split(", ")
        if last == "refit":
            rows.append(("refit", name, ", ".join(rest)))
        elif len(rest) == 2:
            refit = ["refit"] if last.startswith("refit ") else []  # another refit is compared with the default refit
            rows.append(("one change", name, ", ".join(rest + refit)))
    return rows


def measure(name: str, seed: int, windows: int, length: int, threads: int) -> dict:
    """One variant at one seed: for each ratio the loss per held-out window, the sparsity, and raised dampings."""
    torch.set_num_threads(threads)
    base = BASE | {"calibration.seed": seed} | variants()[name]
    model = load_model(model_directory(), device="cpu")
    held_out = held_out_text(model, seed, windows, length)
    calibration = calibrate(model, Config.load(overrides=base))
    results = {}
    for ratio in ratios_of(name):
        config = Config.load(overrides=base | RATIOS[ratio])
        masked = mask(model, config, calibration)
        raised = sum(each["damping"] > config.masking.damping for each in masked.report["factored"])
        results[ratio] = {
            "loss": held_out.loss(masked.model),
            "sparsity": masked.report["sparsity"]["total"],
            "raised": raised,
            "seconds": masked.report["seconds"]["total"],
        }
    return {"variant": name, "seed": seed, "dense_nelbo": held_out.dense.mean, "ratios": results}


def summarise(runs: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, as plain data."""
    rows = []
    for name in variants():
        for ratio in ratios_of(name):
            sparsity = [runs[name, seed]["ratios"][ratio]["sparsity"] for seed in seeds]
            rows.append({"variant": name, "ratio": ratio, **loss_row(runs, name, seeds, ratio), "sparsity": sparsity})
    gaps = []
    for question, name, base in contrasts():
        for ratio in ratios_of(name):
            gap = contrast_row(runs, (name, ratio), (base, ratio), seeds)
            gaps.append({"question": question, "variant": name, "against": base, "ratio": ratio, **gap})
    return {"losses": rows, "contrasts": gaps, "dense": [runs["magnitude", seed]["dense_nelbo"] for seed in seeds]}


def loss_table(result: dict) -> Table:
    """A row per variant, a column per ratio: loss of NELBO, nats per token."""
    table = Table(title="loss of NELBO against dense, nats per token [95% interval over seeds]")
    for title in ("variant", *RATIOS):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for name in variants():
        cells = {row["ratio"]: row for row in result["losses"] if row["variant"] == name}
        table.add_row(name, *(cell(cells.get(ratio)) for ratio in RATIOS))
    return table


def contrast_table(result: dict) -> Table:
    """A row per comparison: paired differences, marked where one is shown."""
    table = Table(title="paired difference, nats per token [95% interval over seeds]; * excludes 0, all seeds agree")
    for title in ("question", "variant", "against", *RATIOS):
        table.add_column(title, justify="right" if title in RATIOS else "left")
    for question, name, base in contrasts():
        cells = {row["ratio"]: row for row in result["contrasts"] if (row["variant"], row["against"]) == (name, base)}
        table.add_row(question, name, base, *(cell(cells.get(ratio), True) for ratio in RATIOS))
    return table


STUDY = Study(
    "mask_study", __doc__.splitlines()[0], "scripts/results/masks.json", BASE, RATIOS, variants(), measure, summarise,
    lambda result: [loss_table(result), contrast_table(result)], 200,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STUDY))
