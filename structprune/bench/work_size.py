"""Bytes of the finished parts that a run keeps on disk, from shapes alone (`structprune prune --work`).

Weights, masks, removal paths, and what is measured of every token; what else is kept is small. A search's levels lie
there too, and are predicted with the search.
"""

import math
from collections.abc import Sequence

import torch

from structprune.bench.mask_memory import kept_in
from structprune.masking.request import MaskRequest
from structprune.models.adapter import Adapter
from structprune.statistics.rows import needs_sinks
from structprune.structured.request import StructuredRequest

FLOAT, LONG, DOUBLE = 4, 8, 8
MASSES = 3  # sets of windows that mass is kept of, at most: all to fit on, a pass under way, the few of a candidate
GENERATED = 2  # times that a reverse trajectory is kept: pass by pass, and whole


def structured_work_bytes(adapter: Adapter, requests: Sequence[StructuredRequest], itemsize: int) -> int:
    """Of a structured run at one ratio or more, which share what is measured of the text.

    Args:
        itemsize: bytes of a weight in memory.
    """
    request, weights = requests[0], sum(_refit_bytes(adapter, each, itemsize) for each in requests)
    refit, units = request.reconstruct, sum(_units(adapter).values())
    weighting = refit.weighting if refit.enabled else "uniform"
    measured = {"certainty": 1, "gradient": sum(len(block.kinds) for block in adapter.blocks)}.get(weighting, 0)
    head = DOUBLE * adapter.hidden_size**2 * (refit.enabled and refit.head)
    arms = [request.arm] + [refit.arm] * refit.enabled
    rows = FLOAT * measured * _row_tokens(adapter, request)
    paths, text = units * (LONG + 2 * DOUBLE), _text_bytes(adapter, arms, request)
    return weights + head * len(requests) + paths + rows + text


def _refit_bytes(adapter: Adapter, request: StructuredRequest, itemsize: int) -> int:
    """Of the refitted weights alone, which is most, and which the text has no part in."""
    weights = sum(block[role].weight.numel() for block in adapter.blocks for role in block.names)
    gone = request.settings.ratio * sum(size.total for size in request.sizes)  # protected blocks stay whole
    plans = 1 + request.config.search.enabled  # the ranked plan, and the one that is searched for
    return math.ceil(plans * (weights - gone) * itemsize * request.reconstruct.enabled)


def mask_work_bytes(adapter: Adapter, request: MaskRequest, stored: torch.dtype) -> int:
    """Of a run for masks.

    Args:
        stored: dtype of the checkpoint's weights.
    """
    arms = [request.arm] + [request.reconstruct.arm] * request.reconstruct.enabled
    weights = sum(block[role].weight.numel() for block in adapter.blocks for role in block.names)
    return weight_bytes(adapter, request, stored) + weights // 8 + _text_bytes(adapter, arms, request)


def weight_bytes(adapter: Adapter, request: StructuredRequest | MaskRequest, stored: torch.dtype) -> int:
    """Of the weights alone; of masks with a refit, those before it too. From disk, weights stay as `stored` if a mask
    changes no other number."""
    dtype = request.resources.weight_dtype(stored)
    if isinstance(request, StructuredRequest):
        return _refit_bytes(adapter, request, dtype.itemsize)
    dtype = kept_in(request, stored) if request.resources.on_disk else dtype
    weights = sum(block[role].weight.numel() for block in adapter.blocks for role in block.names)
    return weights * dtype.itemsize * (1 + request.reconstruct.enabled)


def _units(adapter: Adapter) -> dict[int, int]:
    """Units of every block: query heads and channels."""
    return {block.index: block.widths.query_heads + block.widths.channels for block in adapter.blocks}


def _text_bytes(adapter: Adapter, arms: list, request: StructuredRequest | MaskRequest) -> int:
    """Of attention mass and generated windows."""
    sinks = any(needs_sinks(arm, request.sink) for arm in arms)
    mass = MASSES * FLOAT * _row_tokens(adapter, request) * sinks
    if not request.reads_text or request.calibration.replays or request.sink.trajectory == "forward":
        return mass
    text = request.calibration
    return mass + GENERATED * LONG * (_tokens(request) + text.windows * text.length)


def _row_tokens(adapter: Adapter, request: StructuredRequest | MaskRequest) -> int:
    """As `_tokens`, with the clean text that a layout puts beside a window."""
    return adapter.model.layout.copies * _tokens(request)


def _tokens(request: StructuredRequest | MaskRequest) -> int:
    """In all copies of all windows that are fitted on."""
    text = request.calibration
    return text.windows * text.noisy_copies * text.length
