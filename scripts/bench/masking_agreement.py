"""Whether the two sides of bench_masking.py agree: their outputs compared, and each compared with the referee.

Masks of two correct implementations need not be equal: rounding decides near ties, and in SparseGPT every decision
affects later ones. So ours need not equal the release, but must be as accurate: compared with fp64 it may misplace at
most `TIMES` as many weights as the release. Misplaced weights are those whose exact score is as close to the threshold
as the side's rounding error, so their number is proportional to that error; fp32 sums of the same length in another
order may differ by a factor of 2 or 3. A defect misplaces between ten times as many weights (one weight too few in each
block of columns) and ten thousand times. The release itself must be correct up to near ties, so that an error of the
referee is noticed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from scripts.bench.masking_referee import Referee
from structprune.errors import UserError
from structprune.models.loading import load_model

TIMES = 3.0
FLOOR = {"misplaced": 1e-6, "weights_differ": 1e-5}  # below these, near ties are so few that chance decides
NEAR = 1e-3  # largest relative distance from the threshold at which fp32 may misplace a weight; wrong formulas reach 1
ITSELF = "release-again"
DIFFERENCES = ("masks_differ", "first_block_differs", "outputs_differ")


@torch.inference_mode()
def outputs(model, weights: dict[str, torch.Tensor] | None, ids: torch.Tensor) -> torch.Tensor:
    """Final hidden states (N, T, C) of the model, with some of its linears replaced: `{block}.{name}` -> (O, C)."""
    for name, value in (weights or {}).items():
        index, _, module = name.partition(".")
        model.blocks[int(index)].get_submodule(module).weight.copy_(value)
    return model.encode(ids)


def compare(method: str, folder: Path, sides: tuple[str, str] = ("ours", "release")) -> dict:
    """Differences between the pruned weights of two sides, in all and in the first block, and between their outputs."""
    one, other = (load_file(folder / f"{method}-{side}.safetensors") for side in sides)
    if one.keys() != other.keys():
        raise UserError(f"{method}: the sides pruned different linears, {sorted(one.keys() ^ other.keys())[:3]}")
    first = {name for name in one if name.startswith("0.")}
    ids = load_file(folder / "data.safetensors")["ids"][:2]  # (n, T)
    model = load_model(folder / "checkpoint", torch.float32)
    dense, mine, theirs = (outputs(model, weights, ids) for weights in (None, one, other))  # (n, T, C)
    return {
        "removed": [removed_share(one), removed_share(other)],
        "masks_differ": masks_differ(one, other),
        "first_block_differs": masks_differ({n: one[n] for n in first}, {n: other[n] for n in first}),
        "outputs_differ": float((mine - theirs).norm() / (theirs - dense).norm()),
        "error_ratio": float((mine - dense).norm() / (theirs - dense).norm()),
    }


def judge(figures: dict[str, dict]) -> dict:
    """Whether ours is accurate, from the `Referee`'s figures of `ours` and `release`, and the limits for it."""
    ours, release = figures["ours"], figures["release"]
    limits = {name: max(floor, TIMES * release[name]) for name, floor in FLOOR.items()}
    right = release["widest_gap"] <= NEAR
    return {"against_fp64": figures, "limits": limits, "agree": right and all(ours[n] <= limits[n] for n in limits)}


def agreements(options: argparse.Namespace, folder: Path, run_worker: Callable) -> dict[str, dict]:
    """Method -> `compare` and `judge`; for SparseGPT also the release compared with itself on other threads.

    Args:
        run_worker: `run_worker(side, method, options, folder)` prunes and writes its linears into `folder`.
    """
    itself = {}
    if set(options.methods) - {"wanda", "sink-wanda"}:
        if not (folder / "sparsegpt-release.safetensors").exists():
            run_worker("release", "sparsegpt", options, folder)
        other = argparse.Namespace(**vars(options) | {"threads": 2 if options.threads == 1 else 1})
        run_worker(ITSELF, "sparsegpt", other, folder)
        itself = {"release_itself": compare("sparsegpt", folder, ("release", ITSELF))}
    referee, results = Referee(folder, options.ratio), {}
    for method in options.methods:
        sides = {side: load_file(folder / f"{method}-{side}.safetensors") for side in ("ours", "release")}
        figures = judge({side: referee.judge(method, weights) for side, weights in sides.items()})
        results[method] = compare(method, folder) | figures | (itself if "sparsegpt" in method else {})
    return results


def masks_differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Share of the weights that are zero on one side only."""
    count = sum(int(((value == 0) != (other[name] == 0)).sum()) for name, value in one.items())
    return count / sum(value.numel() for value in one.values())


def removed_share(weights: dict[str, torch.Tensor]) -> float:
    zeros = sum(int((value == 0).sum()) for value in weights.values())
    return zeros / sum(value.numel() for value in weights.values())
