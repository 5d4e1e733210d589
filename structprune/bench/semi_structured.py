"""2:4-masked weights through torch's own semi-structured kernels: what they gain or lose, layer shape by layer shape.

torch.sparse.to_sparse_semi_structured takes cuSPARSELt, for fp16 and bf16 weights; CUTLASS only where it is forced
(SparseSemiStructuredTensor._FORCE_CUTLASS).
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from structprune.bench.latency import interleaved, measure_latency, random_ids, speedup
from structprune.models.adapter import Adapter
from structprune.models.families import ROLES
from structprune.models.modeling_structprune import DiffusionLM
from structprune.statistics.half import HALF

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


def tried(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor | str:
    """The weight in semi-structured form, once it has multiplied (N, C) inputs; or why it cannot, in one line."""
    try:
        sparse = convert(weight)
        F.linear(x, sparse)
    except torch.OutOfMemoryError:  # no matter of kernels
        raise
    except RuntimeError as error:
        return _first_line(error)
    return sparse


def _inputs(weight: torch.Tensor, tokens: int) -> torch.Tensor:
    """Inputs (N, C) for a weight (O, C)."""
    return torch.ones(tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this build and device cannot run 2:4 weights, in one line; None where they can."""
    if device.type != "cuda":
        return f"torch has no 2:4 kernels for device {device.type}"
    if dtype not in HALF:  # CUTLASS would take fp32, but as one of every two
        return f"torch has no 2:4 kernels for {str(dtype).removeprefix('torch.')}: use --dtype bfloat16 or float16"
    weight = torch.tensor([0, 0, 1, 1], device=device).to(dtype).tile(PROBE, PROBE // 4)  # (O, C)
    found = tried(weight, _inputs(weight, PROBE))
    return found if isinstance(found, str) else None


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
        x = _inputs(weight, tokens)  # (N, C)
        sparse = tried(weight, x)
        if isinstance(sparse, str):
            rows.append(row | {"refused": sparse})
            continue
        calls = {"dense": lambda: F.linear(x, weight), "2:4": lambda: F.linear(x, sparse)}  # noqa: B023
        found = interleaved(calls, weight.device, rounds, warmup)
        timed = {f"{name}_ms": latency.quartiles_ms() for name, latency in found.items()}
        rows.append(row | timed | {"speedup": speedup(found["dense"], found["2:4"])})
    return rows


def with_kernels(model: DiffusionLM, tokens: int) -> tuple[DiffusionLM, int, int]:
    """The same model, its 2:4 weights in semi-structured form where that takes `tokens` inputs; all else is shared.

    Returns:
        The model, how many layers run on the kernels, and how many are 2:4.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    clone = copy.deepcopy(model, memo=shared)
    linears, taken = masked_linears(clone), 0
    for linear in linears.values():
        sparse = tried(linear.weight.detach(), _inputs(linear.weight, tokens))
        if not isinstance(sparse, str):  # else `shape_rows` says why
            linear.weight = nn.Parameter(sparse, requires_grad=False)
            taken += 1
    return clone, taken, len(linears)


@torch.inference_mode()
def semi_structured_row(model: DiffusionLM, batch: int, length: int, rounds: int, warmup: int) -> dict:
    """A whole forward pass with and without the kernels, how many of the 2:4 layers run on them, and how far the logits
    are apart relative to their size."""
    other, taken, layers = with_kernels(model, batch * length)
    pair = {"dense": model, "2:4": other}
    apart = _difference(*pair.values(), random_ids(model, batch, length))
    found = measure_latency(pair, length, batch, rounds, warmup)
    timed = {f"{name}_ms": latency.quartiles_ms() for name, latency in found.items()}
    speed = speedup(found["dense"], found["2:4"])
    row = {"batch": batch, "length": length, "layers": taken, "of_layers": layers, **timed}
    return row | {"speedup": speed, "relative_difference": apart}


def _difference(model: DiffusionLM, other: DiffusionLM, ids: torch.Tensor) -> float:
    """Norm of the difference of both models' logits on (B, T), over that of the first's."""
    expected, found = model(ids).logits, other(ids).logits  # 2 x (B, T, V)
    apart = size = 0.0
    for one, two in zip(expected, found):  # row by row, (T, V): an fp32 copy of all of them may not fit
        apart += (two.float() - one.float()).norm().item() ** 2
        size += one.float().norm().item() ** 2
    return (apart / size) ** 0.5


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
