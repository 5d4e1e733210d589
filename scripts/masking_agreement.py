"""Whether two sides of bench_masking.py pruned alike: where they must agree, and where rounding decides."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from structprune.errors import UserError
from structprune.models.loading import load_model

# Where both sides read the same activations, masks differ by near-ties only: everywhere for sink-Wanda, in the first
# block for the others. A single tie changes what later columns and blocks see, so that beyond it two runs of the
# release itself differ, on one thread and on two: that difference is measured, and ours may be so many times it.
SAME_INPUT_LIMIT, TIMES_ITSELF = 1e-5, 3.0
FLOOR = {"masks_differ": 3e-3, "outputs_differ": 0.05}  # where the release differs from itself by less than this
DIFFERENCES = ("masks_differ", "first_block_differs", "outputs_differ")


@torch.inference_mode()
def outputs(model, weights: dict[str, torch.Tensor] | None, ids: torch.Tensor) -> torch.Tensor:
    """Final hidden states (N, T, C) of the model, with some of its linears replaced: `{block}.{name}` -> (O, C)."""
    for name, value in (weights or {}).items():
        index, _, module = name.partition(".")
        model.blocks[int(index)].get_submodule(module).weight.copy_(value)
    return model.encode(ids)


def compare(method: str, folder: Path, sides: tuple[str, str] = ("ours", "release")) -> dict:
    """How far apart the pruned weights of two sides are, in all and in the first block, and what they do."""
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


def judge(method: str, found: dict, itself: dict | None) -> dict:
    """`compare`'s figures with the limits that they must keep; `itself`: how far the release is from itself."""
    limits = {"first_block_differs": SAME_INPUT_LIMIT}
    if method == "sink-wanda":
        limits |= {"masks_differ": SAME_INPUT_LIMIT}
    else:
        limits |= {name: max(floor, TIMES_ITSELF * itself[name]) for name, floor in FLOOR.items()}
    return found | {"limits": limits, "agree": all(found[name] <= limit for name, limit in limits.items())}


def masks_differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Share of the weights that are zero on one side only."""
    apart = sum(int(((value == 0) != (other[name] == 0)).sum()) for name, value in one.items())
    return apart / sum(value.numel() for value in one.values())


def removed_share(weights: dict[str, torch.Tensor]) -> float:
    zeros = sum(int((value == 0).sum()) for value in weights.values())
    return zeros / sum(value.numel() for value in weights.values())
