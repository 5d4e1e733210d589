"""Peak memory: of this process so far, and predicted for a run."""

import resource
import sys
from pathlib import Path

import torch

from structprune.config import Config
from structprune.criteria.table import CRITERIA
from structprune.models.adapter import Adapter
from structprune.models.loading import as_dtype

RUNTIME_BYTES = 450_000_000  # the interpreter with torch and transformers imported


def peak_memory_bytes() -> dict[str, int]:
    """Peak resident memory of the process so far (`host`), and of tensors on the accelerator (`device`, if any)."""
    peak = {"host": _host_peak()}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def _host_peak() -> int:
    """Linux's VmHWM, because `ru_maxrss` of a child process starts at what its parent had."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def predicted_peak(dense: Adapter, pruned: Adapter, config: Config, stored: torch.dtype) -> dict[str, int]:
    """Predicted peak memory of a structured run, in bytes, by part and in total.

    Args:
        dense, pruned: adapters of meta models before and after.
        stored: dtype of the checkpoint's weights.
    Returns:
        Named parts of the three phases that can be the peak (loading, scoring, refit), and "peak" over them. Hidden
        states and held activations beyond `memory.budget_gb` go to files or are computed again, so they are capped.
    """
    settings, device = config.calibration, config.model.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = as_dtype(config.model.dtype) or (torch.float32 if device == "cpu" else stored)
    budget = int(config.memory.budget_gb * 1e9)
    levels = max(1, settings.steps // settings.interval)
    tokens = (settings.windows + settings.held_out) * levels * settings.length
    weights = dense.model.num_parameters() * dtype.itemsize
    shared = sum(p.numel() for p in pruned.model.parameters()) - sum(_block_numbers(pruned))
    copy = (pruned.model.num_parameters() - shared) * dtype.itemsize
    stream = min(tokens * dense.hidden_size * dtype.itemsize, budget)
    consumers = [(block["attention_output"].in_features, block["down"].in_features) for block in dense.blocks]
    widest = max(max(pair) for pair in consumers)
    activations = settings.batch * levels * settings.length * _live_features(dense) * dtype.itemsize
    parts = {"dense weights": weights, "activations of one batch": activations}
    needs = CRITERIA[config.structured.score].needs
    scoring = {"weights": 0, "moments": min(budget, tokens), "gradients": weights}.get(needs, 0)
    if needs == "grams":  # fp32 Gram of both consumers, and three fp64 copies while the wider is inverted
        scoring = stream + max(4 * (a * a + b * b) + 24 * max(a, b) ** 2 for a, b in consumers)
    parts[f"scoring ({config.structured.score})"] = scoring
    refit = 0
    if config.reconstruct.enabled:  # fp32 and fp64 Grams of fit and held-out rows, and a solve
        kept = max(block["down"].in_features for block in pruned.blocks)
        held = tokens * dtype.itemsize * 2 * len(dense.blocks) * dense.hidden_size  # what both consumers should put out
        held = held if held <= budget else 0
        one = tokens * dtype.itemsize * widest
        refit = 24 * kept * kept + 16 * kept * (kept + dense.hidden_size) + 2 * stream + held + (one if one <= budget else 0)
    parts |= {"pruned weights": copy, "refit": refit}
    loading = weights + dense.model.num_parameters() * stored.itemsize
    parts["peak"] = max(loading, weights + activations + max(scoring, copy + refit)) + RUNTIME_BYTES
    return parts


def _block_numbers(adapter: Adapter) -> list[int]:
    return [sum(p.numel() for p in block.module.parameters()) for block in adapter.blocks]


def _live_features(adapter: Adapter) -> int:
    """Features per token alive at once in a block or the head: the wider of the MLP's three and the logits' two."""
    mlp = max(3 * block.widths.channels for block in adapter.blocks)
    return max(mlp + 2 * adapter.hidden_size, adapter.vocabulary)  # at most half of all tokens are masked, x 2 in fp32
