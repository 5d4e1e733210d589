"""Predicted peak memory of a run that makes masks."""

import torch

from structprune.bench.disk_memory import DiskWeights
from structprune.bench.memory import LARGEST_SHARD, RUNTIME_BYTES, live_features, transfers
from structprune.masking.request import MaskRequest
from structprune.models.adapter import Adapter
from structprune.statistics.norms import holds_inputs, late_input_bytes, weighs_late


def predicted_mask_peak(adapter: Adapter, request: MaskRequest, stored: torch.dtype) -> dict[str, int]:
    """Predicted peak memory of an unstructured or N:M run, in bytes, by part and in total.

    Args:
        adapter: of the model on the meta device.
        stored: dtype of the checkpoint's weights.
    Returns:
        Named parts, "peak host" over them, with an accelerator "peak device", and on disk "temporary files". Hidden
        states and weights beyond `memory.budget_gb` are in files and held inputs beyond it are computed again, so all
        are capped.
    """
    resources, refits, batch = request.resources, request.reconstruct.enabled, request.calibration.batch
    dtype, budget = resources.weight_dtype(stored), resources.budget
    weights = adapter.model.num_parameters() * dtype.itemsize
    projections = sum(block[role].weight.numel() for block in adapter.blocks for role in block.names)
    sequence = request.calibration.length * adapter.model.layout.copies * dtype.itemsize  # bytes of a row's feature
    stores = [count * sequence * adapter.hidden_size for count in _stored_sequences(request)]
    statistics = f"statistics ({request.settings.score})"
    parts = {
        "weights": weights,
        "activations of one batch": batch * sequence * live_features(adapter) if request.reads_text else 0,
        statistics: _statistics_bytes(adapter, request, dtype.itemsize),
        "one block's masks": _mask_bytes(adapter, request, dtype.itemsize),
        "refit": _refit_bytes(adapter) if refits else 0,
        "hidden states": sum(min(size, budget) for size in stores),
        "weights before the refit": min(projections * dtype.itemsize, budget) if refits else 0,
        "packed masks": projections // 8,
    }
    states = batch * sequence * adapter.hidden_size
    # one block's masks count the statistics that are left
    working = parts["activations of one batch"] + max(parts[statistics], parts["one block's masks"]) + parts["refit"]
    stored_aside = sum(list(parts.values())[5:])
    shard = min(adapter.model.num_parameters() * stored.itemsize, LARGEST_SHARD)
    before_refit = projections * dtype.itemsize if refits else 0
    files = {"temporary files": sum(size for size in stores if size > budget)}
    files["temporary files"] += before_refit if before_refit > budget or resources.on_disk else 0
    if resources.on_disk:
        files["temporary files"] += projections * kept_in(request, stored).itemsize
        parts |= transfers(adapter, resources, states, sum(map(bool, stores)), dtype)
        return _disk_peak(parts, working, DiskWeights(adapter, dtype, stored), request) | files
    if not resources.accelerator:
        parts["peak host"] = weights + max(shard, stored_aside + working) + RUNTIME_BYTES
        return parts | files
    parts |= transfers(adapter, resources, states, sum(map(bool, stores)), dtype)
    at_home = weights * bool(resources.offload)
    parts["peak host"] = at_home + max(shard, stored_aside + parts["pinned buffers"]) + RUNTIME_BYTES
    parts["peak device"] = parts["layers under way"] if resources.offload else weights
    parts["peak device"] += parts["batches under way"] + working
    return parts | files


def _disk_peak(parts: dict[str, int], working: int, weights: DiskWeights, request: MaskRequest) -> dict[str, int]:
    """The parts and peaks of a run whose weights stay on disk.

    Args:
        parts: those of a run that holds its weights, with what copies to an accelerator hold.
        working: bytes of a block's work.
    """
    check, moved = parts["activations of one batch"], parts["batches under way"]
    held = ("weights", "weights before the refit")
    parts = {name: size for name, size in (parts | weights.parts).items() if name not in held}
    aside = parts["hidden states"] + parts["packed masks"] + parts["pinned buffers"] + RUNTIME_BYTES
    return parts | weights.peaks(request.resources, working + moved, check + moved, aside)


def kept_in(request: MaskRequest, stored: torch.dtype) -> torch.dtype:
    """The dtype of new weights in files: as stored, where a mask changes no other number."""
    changes = request.reconstruct.enabled or request.score.needs == "grams"
    return request.resources.weight_dtype(stored) if changes else stored


def _stored_sequences(request: MaskRequest) -> tuple[int, int]:
    """Sequences whose hidden states a walk keeps in each of its streams (`masking.walk`)."""
    settings, refit, arm = request.calibration, request.reconstruct, request.arm
    noisy = max(1, settings.noisy_copies)

    def copies(each: str) -> int:
        return 1 if each.startswith("clean") else noisy

    scored = settings.windows * copies(arm) if arm and request.walks else 0
    if not refit.enabled:
        return scored, 0
    fitted = settings.windows * copies(refit.arm) + settings.held_out * noisy
    shared = arm is not None and scored and arm.split("+")[0] == refit.arm.split("+")[0]
    one_shot = request.settings.order == "one-shot"
    prefix = fitted + (0 if shared or one_shot else scored)
    dense = (fitted if refit.target == "dense" else 0) + (
        scored if one_shot and not (shared and refit.target == "dense") else 0
    )
    return prefix, dense


def _widths(adapter: Adapter) -> list[list[int]]:
    """Features of each input of every block that has any."""
    return [
        [block[roles[0]].in_features for roles in block.readers.values()] for block in adapter.blocks if block.names
    ]


def _statistics_bytes(adapter: Adapter, request: MaskRequest, itemsize: int) -> int:
    """One block's Grams in fp64, with the widest's fp32 copy; or what the norms of the noisy sink arm hold until a
    batch's pass has ended."""
    grams, held = 0, 0
    if request.score.needs == "grams":
        squares = [[width * width for width in block] for block in _widths(adapter)]
        grams = max(8 * sum(block) + 4 * max(block) for block in squares)
    if request.measures_dense and weighs_late(request.arm, request.sink):
        tokens = request.calibration.batch * request.calibration.length * adapter.model.layout.copies
        if holds_inputs(adapter, tokens, request.resources.budget, itemsize):
            held = late_input_bytes(adapter, tokens, itemsize)
    return max(grams, held)


def _mask_bytes(adapter: Adapter, request: MaskRequest, itemsize: int) -> int:
    """A block's new weights, those and masks of its largest input in fp32, their scores or errors, fp32 Grams and four
    factors; where weights stay on disk as `_disk_mask_bytes`."""
    if request.resources.on_disk:
        return _disk_mask_bytes(adapter, request)
    block = max(adapter.blocks, key=lambda each: sum(each[role].weight.numel() for role in each.names))
    numbers = sum(block[role].weight.numel() for role in block.names)
    largest = max(sum(block[role].weight.numel() for role in roles) for roles in block.readers.values())
    if request.score.needs != "grams":
        return itemsize * numbers + 21 * largest
    squares = [[width * width for width in widths] for widths in _widths(adapter)]
    return itemsize * numbers + 21 * largest + 4 * max(map(sum, squares)) + 16 * max(map(max, squares))


def _disk_mask_bytes(adapter: Adapter, request: MaskRequest) -> int:
    """The most that an input's weights take, with the Gram matrices that are left and a factor and a half; new weights
    go to files at once. Measured on CPU at 4,096 and 12,288 inputs."""
    block = max(adapter.blocks, key=lambda each: sum(each[role].weight.numel() for role in each.names))
    inputs = [(sum(block[role].weight.numel() for role in roles), block[roles[0]].in_features**2)
              for roles in block.readers.values()]  # fmt: skip
    grams = int(request.score.needs == "grams")
    left = [sum(square for _, square in inputs[place:]) for place in range(len(inputs))]
    return max(17 * count + grams * (4 * rest + 6 * square) for (count, square), rest in zip(inputs, left))


def _refit_bytes(adapter: Adapter) -> int:
    """fp32 products of fit and held-out rows of the widest input, fp64 copies of them, and a matrix's rows."""
    widest = max(map(max, _widths(adapter)))
    largest = max(block[role].weight.numel() for block in adapter.blocks for role in block.names)
    return 44 * widest * widest + 72 * largest
