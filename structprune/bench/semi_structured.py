"""2:4-masked weights on torch's own semi-structured kernels: the speed-up of each layer shape and of whole passes.

torch.sparse.to_sparse_semi_structured uses cuSPARSELt for fp16 and bf16 weights; CUTLASS only where it is forced
(SparseSemiStructuredTensor._FORCE_CUTLASS).
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from structprune.bench.latency import Timing, interleaved, measure_latency, random_ids, speedup
from structprune.bench.settings import Size
from structprune.files import first_line
from structprune.models.adapter import Adapter
from structprune.models.modeling_structprune import DiffusionLM
from structprune.statistics.half import HALF

PROBE = 128  # rows and columns that every kernel accepts


def has_pattern(weight: torch.Tensor) -> bool:
    """Whether two of every four neighbouring inputs are zero, (O, C)."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def masked_linears(model: DiffusionLM) -> dict[str, nn.Linear]:
    """Name -> linear, for the block linears whose weights are 2:4."""
    linears = {view.names[role]: view[role] for view in Adapter(model).blocks for role in view.names}
    return {name: linear for name, linear in linears.items() if has_pattern(linear.weight)}


def convert(weight: torch.Tensor) -> torch.Tensor:
    """The weight in semi-structured form.

    Raises:
        RuntimeError: a device, dtype or shape that torch has no kernel for.
    """
    return torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())


def try_kernel(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor | str:
    """The weight in semi-structured form, after a product with inputs (N, C); or why that fails, in one line."""
    try:
        sparse = convert(weight)
        F.linear(x, sparse)
    except torch.OutOfMemoryError:  # says nothing about kernels
        raise
    except RuntimeError as error:
        return first_line(error)
    return sparse


def _inputs(weight: torch.Tensor, tokens: int) -> torch.Tensor:
    """Inputs (N, C) for a weight (O, C)."""
    return torch.ones(tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this build and device cannot run 2:4 weights, in one line; None where they can."""
    if device.type != "cuda":
        return f"torch has no 2:4 kernels for device {device.type}"
    if dtype not in HALF:  # CUTLASS would accept fp32, but as 1:2
        return f"torch has no 2:4 kernels for {str(dtype).removeprefix('torch.')}: use --dtype bfloat16 or float16"
    weight = torch.tensor([0, 0, 1, 1], device=device).to(dtype).tile(PROBE, PROBE // 4)  # (O, C)
    sparse = try_kernel(weight, _inputs(weight, PROBE))
    return sparse if isinstance(sparse, str) else None


@torch.inference_mode()
def shape_rows(model: DiffusionLM, tokens: int, timing: Timing) -> list[dict]:
    """One row per shape (O, C) of 2:4 weights: time for `tokens` inputs, dense and with the kernel, or its refusal."""
    linears = masked_linears(model)
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, linear in linears.items():
        shapes.setdefault(tuple(linear.weight.shape), []).append(name)
    rows = []
    for (outputs, inputs), names in shapes.items():
        weight = linears[names[0]].weight.detach()
        row = {"outputs": outputs, "inputs": inputs, "layers": len(names), "first": names[0], "tokens": tokens}
        x = _inputs(weight, tokens)  # (N, C)
        sparse = try_kernel(weight, x)
        if isinstance(sparse, str):
            rows.append(row | {"refused": sparse})
            continue
        calls = {"dense": partial(F.linear, x, weight), "2:4": partial(F.linear, x, sparse)}
        latencies = interleaved(calls, weight.device, timing)
        times = {f"{name}_ms": latency.quartiles_ms() for name, latency in latencies.items()}
        rows.append(row | times | {"speedup": speedup(latencies["dense"], latencies["2:4"])})
    return rows


def with_kernels(model: DiffusionLM, tokens: int) -> tuple[DiffusionLM, int, int]:
    """A copy of the model whose 2:4 weights are semi-structured where a kernel accepts `tokens` inputs.

    All other tensors are shared.

    Returns:
        The model, the number of layers that run on kernels, and the number of 2:4 layers.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    clone = copy.deepcopy(model, memo=shared)
    linears, converted = masked_linears(clone), 0
    for linear in linears.values():
        sparse = try_kernel(linear.weight.detach(), _inputs(linear.weight, tokens))
        if not isinstance(sparse, str):  # `shape_rows` reports refusals
            linear.weight = nn.Parameter(sparse, requires_grad=False)
            converted += 1
    return clone, converted, len(linears)


@torch.inference_mode()
def semi_structured_row(model: DiffusionLM, size: Size, timing: Timing) -> dict:
    """A whole forward pass with and without the kernels: speed-up, how many 2:4 layers run on kernels, and the norm of
    the logits' difference relative to the logits' norm."""
    sparse, converted, layers = with_kernels(model, size.batch * size.length)
    difference = _difference(model, sparse, random_ids(model, size.batch, size.length))
    latencies = measure_latency({"dense": model, "2:4": sparse}, size.length, size.batch, timing)
    times = {f"{name}_ms": latency.quartiles_ms() for name, latency in latencies.items()}
    speed = speedup(latencies["dense"], latencies["2:4"])
    row = {"batch": size.batch, "length": size.length, "layers": converted, "of_layers": layers, **times}
    return row | {"speedup": speed, "relative_difference": difference}


def _difference(model: DiffusionLM, other: DiffusionLM, ids: torch.Tensor) -> float:
    """Norm of the difference of both models' logits on (B, T), over the norm of the first one's."""
    pair = zip(model(ids).logits, other(ids).logits, strict=True)  # B x 2 x (T, V)
    difference = norm = 0.0
    for ours, theirs in pair:  # sequence by sequence: an fp32 copy of all logits may not fit
        difference += (theirs.float() - ours.float()).norm().item() ** 2
        norm += ours.float().norm().item() ** 2
    return (difference / norm) ** 0.5
