"""Predicted peak memory of a run that makes masks."""

import torch

from structprune.bench.memory import LARGEST_SHARD, RUNTIME_BYTES, live_features, transfers
from structprune.config import Config
from structprune.masking.rows import reads_text, walked
from structprune.masking.scores.table import SCORES, resolve_score
from structprune.models.adapter import READERS, Adapter
from structprune.models.loading import as_dtype
from structprune.statistics.norms import held_bytes, weighs_late


def predicted_mask_peak(adapter: Adapter, config: Config, stored: torch.dtype) -> dict[str, int]:
    """Predicted peak memory of an unstructured or N:M run, in bytes, by part and in total.

    Args:
        adapter: of the model on the meta device.
        stored: dtype of the checkpoint's weights.
    Returns:
        Named parts, "peak host" over them, with an accelerator "peak device", and on disk "temporary files". Hidden
        states and weights beyond `memory.budget_gb` are in files and held inputs beyond it are computed again, so all
        are capped.
    """
    base, arm = resolve_score(config.masking.score, config.masking.arm)
    device = config.model.device or ("cuda" if torch.cuda.is_available() else "cpu")
    accelerator, offload = device != "cpu", config.memory.offload
    dtype = as_dtype(config.model.dtype) or (stored if accelerator else torch.float32)
    weights, budget = adapter.model.num_parameters() * dtype.itemsize, int(config.memory.budget_gb * 1e9)
    projections = sum(block[role].weight.numel() for block in adapter.blocks for role in block.names)
    sequence = config.calibration.length * dtype.itemsize  # bytes of one feature
    reads = reads_text(config, arm)
    stores = [count * sequence * adapter.hidden_size for count in _stored_sequences(config, base, arm)]
    parts = {
        "weights": weights,
        "activations of one batch": config.calibration.batch * sequence * live_features(adapter) if reads else 0,
        f"statistics ({config.masking.score})": _statistics_bytes(adapter, config, base, arm, dtype.itemsize),
        "one block's masks": _mask_bytes(adapter, base, dtype.itemsize),
        "refit": _refit_bytes(adapter) if config.reconstruct.enabled else 0,
        "hidden states": sum(min(size, budget) for size in stores),
        "weights before the refit": min(projections * dtype.itemsize, budget) if config.reconstruct.enabled else 0,
        "packed masks": projections // 8,
    }
    working = sum(list(parts.values())[1:5])
    stored_aside = sum(list(parts.values())[5:])
    shard = min(adapter.model.num_parameters() * stored.itemsize, LARGEST_SHARD)
    before_refit = [projections * dtype.itemsize] if config.reconstruct.enabled else []
    files = {"temporary files": sum(size for size in (*stores, *before_refit) if size > budget)}
    if not accelerator:
        parts["peak host"] = weights + max(shard, stored_aside + working) + RUNTIME_BYTES
        return parts | files
    batch = config.calibration.batch * sequence * adapter.hidden_size
    parts |= transfers(adapter, config, batch, sum(size > 0 for size in stores), dtype)
    parts["peak host"] = (
        max(shard, stored_aside + parts["pinned buffers"]) + (weights if offload else 0) + RUNTIME_BYTES
    )
    parts["peak device"] = (parts["layers under way"] if offload else weights) + parts["batches under way"] + working
    return parts | files


def _stored_sequences(config: Config, base: str, arm: str | None) -> tuple[int, int]:
    """Sequences whose hidden states a walk keeps in each of its streams (`masking.walk`)."""
    settings, refit = config.calibration, config.reconstruct
    levels = max(1, settings.steps // settings.interval)

    def copies(each: str) -> int:
        return 1 if each.startswith("clean") else levels

    scored = settings.windows * copies(arm) if arm and walked(config, base) else 0
    if not refit.enabled:
        return scored, 0
    fitted = settings.windows * copies(refit.arm) + settings.held_out * levels
    shared = arm is not None and scored and arm.split("+")[0] == refit.arm.split("+")[0]
    one_shot = config.masking.order == "one-shot"
    prefix = fitted + (0 if shared or one_shot else scored)
    dense = (fitted if refit.target == "dense" else 0) + (
        scored if one_shot and not (shared and refit.target == "dense") else 0
    )
    return prefix, dense


def _widths(adapter: Adapter) -> list[list[int]]:
    """Features of each input of every block."""
    return [[block[roles[0]].in_features for roles in READERS.values()] for block in adapter.blocks]


def _statistics_bytes(adapter: Adapter, config: Config, base: str, arm: str | None, itemsize: int) -> int:
    """One block's Grams; or what the norms of the noisy sink arm hold until a batch's pass has ended."""
    grams, held = 0, 0
    if SCORES[base].needs == "grams":
        grams = max(4 * sum(width * width for width in block) for block in _widths(adapter))
    one_shot = config.masking.allocation == "owl" or (arm is not None and not walked(config, base))
    if one_shot and weighs_late(arm, config.sink):
        held = held_bytes(adapter, config.calibration.batch * config.calibration.length, itemsize)
    return max(grams, held if held <= config.memory.budget_gb * 1e9 else 0)


def _mask_bytes(adapter: Adapter, base: str, itemsize: int) -> int:
    """A block's new weights, those and masks of its largest input in fp32, their scores or errors, and four factors."""
    block = max(adapter.blocks, key=lambda each: sum(each[role].weight.numel() for role in each.names))
    numbers = sum(block[role].weight.numel() for role in block.names)
    largest = max(sum(block[role].weight.numel() for role in roles) for roles in READERS.values())
    factor = 16 * max(map(max, _widths(adapter))) ** 2 if base == "sparsegpt" else 0
    return itemsize * numbers + 21 * largest + factor


def _refit_bytes(adapter: Adapter) -> int:
    """fp32 products of fit and held-out rows of the widest input, fp64 copies of them, and a matrix's rows."""
    widest = max(map(max, _widths(adapter)))
    largest = max(block[role].weight.numel() for block in adapter.blocks for role in block.names)
    return 44 * widest * widest + 72 * largest
