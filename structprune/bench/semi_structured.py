"""2:4-masked weights through torch's own semi-structured kernels: what they gain or lose, layer shape by layer shape.

cuSPARSELt or CUTLASS, whichever the build has (torch.sparse.to_sparse_semi_structured).
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from structprune.bench.latency import interleaved, measure_latency, random_ids, speedup
from structprune.models.adapter import Adapter
from structprune.models.families import ROLES
from structprune.models.modeling_structprune import DiffusionLM

PROBE = 128  # rows and columns that every kernel takes


def has_pattern(weight: torch.Tensor) -> bool:
    """Whether two of every four neighbouring inputs are zero, (O, C)."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def masked_linears(model: DiffusionLM) -> dict[str, nn.Linear]:
    """Name -> the block linears whose weights are 2:4."""
    views = Adapter(model).blocks
    found = {view.names[role]: view[role] for view in views for role in ROLES}
    return {name: linear for name, linear in found.items() if has_pattern(linear.weight)}


def convert(weight: torch.Tensor) -> torch.Tensor:
    """The weight in semi-structured form.

    Raises:
        RuntimeError: a device, dtype or shape that torch has no kernel for.
    """
    return torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this build and device cannot run 2:4 weights, in one line; None where they can."""
    if device.type != "cuda":
        return f"torch has no 2:4 kernels for device {device.type}"
    weight = torch.tensor([0, 0, 1, 1], device=device).to(dtype).tile(PROBE, PROBE // 4)  # (O, C)
    try:
        F.linear(torch.ones(PROBE, PROBE, device=device, dtype=dtype), convert(weight))
    except RuntimeError as error:
        return _first_line(error)
    return None


@torch.inference_mode()
def shape_rows(model: DiffusionLM, tokens: int, rounds: int, warmup: int) -> list[dict]:
    """One row per shape (O, C) of 2:4 weights: time of `tokens` inputs with both kernels, or why there is none."""
    linears = masked_linears(model)
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, linear in linears.items():
        shapes.setdefault(tuple(linear.weight.shape), []).append(name)
    rows = []
    for (outputs, inputs), names in shapes.items():
        weight = linears[names[0]].weight.detach()
        row = {"outputs": outputs, "inputs": inputs, "layers": len(names), "first": names[0], "tokens": tokens}
        try:
            sparse = convert(weight)
        except RuntimeError as error:
            rows.append(row | {"refused": _first_line(error)})
            continue
        x = torch.ones(tokens, inputs, device=weight.device, dtype=weight.dtype)  # (N, C)
        calls = {"dense": lambda: F.linear(x, weight), "2:4": lambda: F.linear(x, sparse)}  # noqa: B023
        found = interleaved(calls, weight.device, rounds, warmup)
        timed = {f"{name}_ms": latency.quartiles_ms() for name, latency in found.items()}
        rows.append(row | timed | {"speedup": speedup(found["dense"], found["2:4"])})
    return rows


def with_kernels(model: DiffusionLM) -> DiffusionLM:
    """The same model, its 2:4 weights in semi-structured form where torch takes their shape; all else is shared."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    clone = copy.deepcopy(model, memo=shared)
    for linear in masked_linears(clone).values():
        try:
            sparse = convert(linear.weight)
        except RuntimeError:  # reported by shape
            continue
        linear.weight = nn.Parameter(sparse, requires_grad=False)
    return clone


@torch.inference_mode()
def semi_structured_row(model: DiffusionLM, batch: int, length: int, rounds: int, warmup: int) -> dict:
    """A whole forward pass with and without the kernels, and how far the logits are apart relative to their size."""
    pair = {"dense": model, "2:4": with_kernels(model)}
    ids = random_ids(model, batch, length)  # (B, T)
    logits, other = (each(ids).logits.float() for each in pair.values())  # 2 x (B, T, V)
    apart = ((other - logits).norm() / logits.norm()).item()
    found = measure_latency(pair, length, batch, rounds, warmup)
    timed = {f"{name}_ms": latency.quartiles_ms() for name, latency in found.items()}
    speed = speedup(found["dense"], found["2:4"])
    return {"batch": batch, "length": length, **timed, "speedup": speed, "relative_difference": apart}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
