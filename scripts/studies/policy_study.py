"""Sink policies and trajectories on the embedded model: the effect of sparing stable sinks, over seeds.

The claim is that sinks which move while a diffusion LM denoises may be ignored, and that this shows along its own
generation. So every policy (all sinks, unstable ones, none) runs on both trajectories, forward noise and the model's
own denoising, in both pruning paths at ratio 0.5. Losses of NELBO against the dense model are measured on held-out text
under noise that all variants of a seed share; also how much weight each policy removes, and how long sinks last.
Intervals are over seeds (see studies.py). An interrupted study continues where it stopped.

    python -m scripts.studies.policy_study --out scripts/results/policies.json
"""

import sys
from functools import lru_cache

import torch
from rich.table import Table

from scripts.studies.studies import CALIBRATION, CONSUMERS, Study, cell, contrast_row, held_out_text, loss_row, main
from structprune.assets import model_directory
from structprune.calibration.batches import Calibration
from structprune.config import Config
from structprune.models.loading import load_model
from structprune.runs.prune import prune
from structprune.runs.pruner import Pruner

RATIO = "0.5"
# a fixed number of heads (about that of the measured split, see quality.json), so that only scores differ
STRUCTURED = CONSUMERS | {"structured.ratio": 0.5, "structured.arm": "masked+sink", "structured.split": 14}
TOO = ", refit too"  # the refit has the same weights as the scores
WAYS = {
    "structured": STRUCTURED,
    f"structured{TOO}": STRUCTURED | {"reconstruct.arm": "masked+sink"},
    "sparsegpt": {"method": "unstructured", "masking.score": "sink-sparsegpt", "reconstruct.enabled": False},
}
TRAJECTORIES = ("forward", "reverse")
POLICIES = ("all", "unstable", "none")


def name_of(way: str, trajectory: str, policy: str) -> str:
    """A variant's name; policy none has no weights, so its refit is the same with and without them."""
    return f"{way.removesuffix(TOO) if policy == 'none' else way}, {trajectory}, {policy}"


def variants() -> dict[str, dict]:
    """Name -> configuration keys."""
    return {
        name_of(way, trajectory, policy): WAYS[way.removesuffix(TOO) if policy == "none" else way]
        | {"sink.policy": policy, "sink.trajectory": trajectory}
        for way in WAYS for trajectory in TRAJECTORIES for policy in POLICIES
    }  # fmt: skip


def contrasts() -> list[tuple[str, str, str]]:
    """(question, variant, variant it is compared with)."""
    rows = []
    for way in WAYS:
        for trajectory in TRAJECTORIES:
            names = {policy: name_of(way, trajectory, policy) for policy in POLICIES}
            rows.append(("all sinks against none", names["all"], names["none"]))
            rows.append(("unstable sinks against none", names["unstable"], names["none"]))
            rows.append(("unstable sinks against all", names["unstable"], names["all"]))
    for way in WAYS:
        for policy in POLICIES:
            if policy != "none" or not way.endswith(TOO):
                reverse, forward = (name_of(way, trajectory, policy) for trajectory in ("reverse", "forward"))
                rows.append(("own generation against noise", reverse, forward))
    return rows


@lru_cache(maxsize=2)
def calibration_of(trajectory: str, seed: int) -> Calibration:
    """The calibration set that all variants of a trajectory and a seed share, made once per process."""
    model = load_model(model_directory(), device="cpu")
    config = Config.load(overrides=CALIBRATION | {"calibration.seed": seed, "sink.trajectory": trajectory})
    return Pruner(model, config).calibration


def measure(name: str, seed: int, windows: int, length: int, threads: int) -> dict:
    """One variant at one seed: the loss per held-out window, and what the policy removed."""
    torch.set_num_threads(threads)
    config = Config.load(overrides=CALIBRATION | {"calibration.seed": seed} | variants()[name])
    model = load_model(model_directory(), device="cpu")
    held_out = held_out_text(model, seed, windows, length)
    pruned = prune(model, config, calibration_of(config.sink.trajectory, seed))
    result = {
        "loss": held_out.loss(pruned.model),
        "sinks": pruned.report["sinks"],
        "kept": pruned.report["held_out_nelbo"]["kept"],
    }
    return {"variant": name, "seed": seed, "dense_nelbo": held_out.dense.mean, "ratios": {RATIO: result}}


def summarise(runs: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, and what policies removed, as plain data."""
    rows, gaps = [], []
    for name in variants():
        sinks = _sinks([runs[name, seed]["ratios"][RATIO]["sinks"] for seed in seeds])
        rows.append({"variant": name, "ratio": RATIO, **loss_row(runs, name, seeds, RATIO), **sinks})
    for question, name, base in contrasts():
        gap = contrast_row(runs, (name, RATIO), (base, RATIO), seeds)
        gaps.append({"question": question, "variant": name, "against": base, "ratio": RATIO, **gap})
    dense = [runs[name_of("sparsegpt", "forward", "none"), seed]["dense_nelbo"] for seed in seeds]
    return {"losses": rows, "contrasts": gaps, "dense": dense}


def _sinks(reports: list[dict]) -> dict:
    """For every seed: shares of weight removed, also by level and from mask tokens; sinks, and how long they last."""
    if None in reports:
        return {"taken": None}
    removed = [report["taken"][report["policy"]] for report in reports]
    return {
        "taken": [each["share"] for each in removed],
        "taken_by_level": [each["by_level"] for each in removed],
        "of_mask": [each["of_mask"] for each in removed],
        "mask_share": [report["mask_share"] for report in reports],
        "sinks": [report["sinks"] for report in reports],
        "survival": [report["survival"] for report in reports],
    }


def loss_table(result: dict) -> Table:
    """A row per variant: loss of NELBO, weight removed, sinks and how long they last."""
    table = Table(title="loss of NELBO against dense at 0.5, nats per token [95% interval over seeds]")
    for title in ("variant", "loss", "weight removed", "of it from masks", "sinks", "levels a sink lasts"):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for row in result["losses"]:
        cells = [""] * 4
        if row["taken"] is not None:
            values = (row["taken"], row["of_mask"], row["sinks"], row["survival"])
            cells = [f"{100 * sum(value) / len(value):.2f} %" for value in values]
        table.add_row(row["variant"], cell(row), *cells)
    return table


def contrast_table(result: dict) -> Table:
    """A row per comparison: the paired difference, marked if it is shown."""
    table = Table(title="paired difference, nats per token [95% interval over seeds]; * excludes 0, all seeds agree")
    for title in ("question", "variant", "against", "difference"):
        table.add_column(title, justify="right" if title == "difference" else "left")
    for row in result["contrasts"]:
        table.add_row(row["question"], row["variant"], row["against"], cell(row, True))
    return table


STUDY = Study(
    "policy_study", __doc__.splitlines()[0], "scripts/results/policies.json", CALIBRATION, [RATIO], variants(), measure,
    summarise, lambda result: [loss_table(result), contrast_table(result)],
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STUDY))
