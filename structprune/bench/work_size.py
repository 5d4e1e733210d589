"""Bytes of the finished parts that a run keeps on disk, from shapes alone (`structprune prune --work`).

Weights, masks, removal paths and attention mass; what else is kept is small. A search's levels lie there too, and are
predicted with the search.
"""

import math

from structprune.masking.request import MaskRequest
from structprune.models.adapter import Adapter
from structprune.statistics.rows import needs_sinks
from structprune.structured.request import StructuredRequest

FLOAT, LONG, DOUBLE = 4, 8, 8
WINDOWS = 2  # sets of windows that mass is kept of, at most: all to fit on, and the few of a candidate


def structured_work_bytes(adapter: Adapter, request: StructuredRequest, itemsize: int) -> int:
    """Of a structured run at one ratio.

    Args:
        itemsize: bytes of a weight in memory.
    """
    refit, units = request.reconstruct, sum(_units(adapter).values())
    head = DOUBLE * adapter.hidden_size**2 * (refit.enabled and refit.head)
    arms = [request.arm] + [refit.arm] * refit.enabled
    return refit_bytes(adapter, request, itemsize) + head + units * (LONG + 2 * DOUBLE) + _mass_bytes(arms, request)


def refit_bytes(adapter: Adapter, request: StructuredRequest, itemsize: int) -> int:
    """Of the refitted weights alone, which is most, and which the text has no part in."""
    weights = sum(block[role].weight.numel() for block in adapter.blocks for role in block.names)
    gone = request.settings.ratio * sum(size.total for size in request.sizes)  # protected blocks stay whole
    plans = 1 + request.config.search.enabled  # the ranked plan, and the one that is searched for
    return math.ceil(plans * (weights - gone) * itemsize * request.reconstruct.enabled)


def mask_work_bytes(adapter: Adapter, request: MaskRequest, itemsize: int) -> int:
    """Of a run for masks."""
    arms = [request.arm] + [request.reconstruct.arm] * request.reconstruct.enabled
    return mask_weight_bytes(adapter, request, itemsize) + _mass_bytes(arms, request)


def mask_weight_bytes(adapter: Adapter, request: MaskRequest, itemsize: int) -> int:
    """Of weights and masks alone; with a refit, weights are kept as they were before it too."""
    weights = sum(block[role].weight.numel() for block in adapter.blocks for role in block.names)
    return weights * itemsize * (1 + request.reconstruct.enabled) + weights // 8


def _units(adapter: Adapter) -> dict[int, int]:
    """Units of every block: query heads and channels."""
    return {block.index: block.widths.query_heads + block.widths.channels for block in adapter.blocks}


def _mass_bytes(arms: list, request: StructuredRequest | MaskRequest) -> int:
    text = request.calibration
    if not any(needs_sinks(arm, request.sink) for arm in arms):
        return 0
    return WINDOWS * FLOAT * text.windows * text.noisy_copies * text.length
