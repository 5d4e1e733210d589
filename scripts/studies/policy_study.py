"""Sink policies and trajectories on the embedded model: what sparing the sinks that stay is worth, over seeds.

The claim is that sinks which move while a diffusion LM denoises may be ignored, and that this shows along its own
generation. So every policy (all sinks, unstable ones, none) runs on both trajectories, forward noise and the model's
own denoising, in both pruning paths at ratio 0.5; losses of NELBO against the dense model are measured on held-out text
under noise that all variants of a seed share. Beside them: how much weight each policy took, and how long sinks last.
Intervals are over seeds (see studies.py). A killed study goes on where it stopped.

    python -m scripts.studies.policy_study --out scripts/results/policies.json
"""

import sys
from functools import lru_cache

import torch
from rich.table import Table

from scripts.studies.studies import Study, cell, contrast_row, held_out_text, loss_row, main
from structprune.assets import model_directory
from structprune.calibration.batches import Calibration
from structprune.config import Config
from structprune.models.loading import load_model
from structprune.runs.demo import BASE as DEMO
from structprune.runs.prune import Pruner, prune

BASE = {key: value for key, value in DEMO.items() if key.startswith("calibration.")}
RATIO = "0.5"
# a fixed number of heads (about what the measured split finds, see quality.json), so that scores alone differ
STRUCTURED = {"structured.ratio": 0.5, "structured.arm": "masked+sink", "structured.split": 14}
TOO = ", refit too"  # the refit is weighted as the scores are
WAYS = {
    "structured": STRUCTURED,
    f"structured{TOO}": STRUCTURED | {"reconstruct.arm": "masked+sink"},
    "sparsegpt": {"method": "unstructured", "masking.score": "sink-sparsegpt", "reconstruct.enabled": False},
}
TRAJECTORIES = ("forward", "reverse")
POLICIES = ("all", "unstable", "none")


def name_of(way: str, trajectory: str, policy: str) -> str:
    """A variant's name; without sinks it does not matter what they would weight."""
    return f"{way.removesuffix(TOO) if policy == 'none' else way}, {trajectory}, {policy}"


def variants() -> dict[str, dict]:
    """Name -> configuration keys."""
    return {
        name_of(way, trajectory, policy): WAYS[way.removesuffix(TOO) if policy == "none" else way]
        | {"sink.policy": policy, "sink.trajectory": trajectory}
        for way in WAYS for trajectory in TRAJECTORIES for policy in POLICIES
    }  # fmt: skip


def contrasts() -> list[tuple[str, str, str]]:
    """(question, variant, what it is compared with)."""
    found = []
    for way in WAYS:
        for trajectory in TRAJECTORIES:
            names = {policy: name_of(way, trajectory, policy) for policy in POLICIES}
            found.append(("all sinks against none", names["all"], names["none"]))
            found.append(("unstable sinks against none", names["unstable"], names["none"]))
            found.append(("unstable sinks against all", names["unstable"], names["all"]))
    for way in WAYS:
        for policy in POLICIES:
            if policy != "none" or not way.endswith(TOO):
                pair = (name_of(way, trajectory, policy) for trajectory in ("reverse", "forward"))
                found.append(("own generation against noise", *pair))
    return found


@lru_cache(maxsize=2)
def calibration_of(trajectory: str, seed: int) -> Calibration:
    """What all variants of a trajectory and a seed look at, made once by a process."""
    model = load_model(model_directory(), device="cpu")
    config = Config.load(overrides=BASE | {"calibration.seed": seed, "sink.trajectory": trajectory})
    return Pruner(model, config).calibration


def measure(name: str, seed: int, windows: int, length: int, threads: int) -> dict:
    """One variant at one seed: the loss per held-out window, and what the policy took."""
    torch.set_num_threads(threads)
    config = Config.load(overrides=BASE | {"calibration.seed": seed} | variants()[name])
    model = load_model(model_directory(), device="cpu")
    held_out = held_out_text(model, seed, windows, length)
    made = prune(model, config, calibration_of(config.sink.trajectory, seed))
    found = {
        "loss": held_out.loss(made.model),
        "sinks": made.report["sinks"],
        "kept": made.report["held_out_nelbo"]["kept"],
    }
    return {"variant": name, "seed": seed, "dense_nelbo": held_out.dense.mean, "ratios": {RATIO: found}}


def summarise(done: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, and what went, as plain data."""
    rows, gaps = [], []
    for name in variants():
        found = [done[name, seed]["ratios"][RATIO] for seed in seeds]
        rows.append({"variant": name, "ratio": RATIO, **loss_row(done, name, seeds, RATIO), **_sinks(found)})
    for question, name, base in contrasts():
        gap = contrast_row(done, (name, RATIO), (base, RATIO), seeds)
        gaps.append({"question": question, "variant": name, "against": base, "ratio": RATIO, **gap})
    dense = [done[name_of("sparsegpt", "forward", "none"), seed]["dense_nelbo"] for seed in seeds]
    return {"losses": rows, "contrasts": gaps, "dense": dense}


def _sinks(found: list[dict]) -> dict:
    """Of every seed: shares of weight taken, also by level and from mask tokens; sinks, and how long they last."""
    seen = [each["sinks"] for each in found]
    if None in seen:
        return {"taken": None}
    taken = [each["taken"][each["policy"]] for each in seen]
    return {
        "taken": [each["share"] for each in taken],
        "taken_by_level": [each["by_level"] for each in taken],
        "of_mask": [each["of_mask"] for each in taken],
        "mask_share": [each["mask_share"] for each in seen],
        "sinks": [each["sinks"] for each in seen],
        "survival": [each["survival"] for each in seen],
    }


def loss_table(result: dict) -> Table:
    """A row per variant: loss of NELBO, weight taken, sinks that last."""
    table = Table(title="loss of NELBO against dense at 0.5, nats per token [95% interval over seeds]")
    for title in ("variant", "loss", "weight taken", "of it from masks", "sinks", "levels a sink lasts"):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for row in result["losses"]:
        cells = [""] * 4
        if row["taken"] is not None:
            values = (row["taken"], row["of_mask"], row["sinks"], row["survival"])
            cells = [f"{100 * sum(value) / len(value):.2f} %" for value in values]
        table.add_row(row["variant"], cell(row), *cells)
    return table


def contrast_table(result: dict) -> Table:
    """A row per comparison: the paired difference, and whether one was shown."""
    table = Table(title="paired difference, nats per token [95% interval over seeds]; * excludes 0, all seeds agree")
    for title in ("question", "variant", "against", "difference"):
        table.add_column(title, justify="right" if title == "difference" else "left")
    for row in result["contrasts"]:
        table.add_row(row["question"], row["variant"], row["against"], cell(row, True))
    return table


STUDY = Study(
    "policy_study", __doc__.splitlines()[0], "scripts/results/policies.json", BASE, [RATIO], variants(), measure,
    summarise, lambda result: [loss_table(result), contrast_table(result)],
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STUDY))
