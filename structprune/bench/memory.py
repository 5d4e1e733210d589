"""Peak memory: of this process so far, and predicted for a run."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from structprune.config import Config
from structprune.criteria.table import CRITERIA, resolve_arm
from structprune.models.adapter import Adapter
from structprune.models.loading import as_dtype
from structprune.models.transfer import PINNED_BYTES
from structprune.statistics.rows import needs_sinks

LARGEST_SHARD = 5_000_000_000  # official checkpoints are cut at 5 GB; a shard is in memory beside what was read so far
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
        Named parts of the phases that can be the peak (loading, scoring, refit), "peak host" over them, with an
        accelerator "peak device", and on disk "temporary files". Hidden states and held activations beyond
        `memory.budget_gb` go to files or are computed again, so they are capped.
    """
    device = config.model.device or ("cuda" if torch.cuda.is_available() else "cpu")
    accelerator, offload = device != "cpu", config.memory.offload
    dtype = as_dtype(config.model.dtype) or (stored if accelerator else torch.float32)
    shared = sum(p.numel() for p in pruned.model.parameters()) - sum(_block_numbers(pruned))
    size = Tokens.of(config).scaled(dtype.itemsize)
    weights = dense.model.num_parameters() * dtype.itemsize
    copy = (pruned.model.num_parameters() - shared) * dtype.itemsize
    stream, streams = size.all * dense.hidden_size, 2 if config.reconstruct.enabled else 1
    files = {"temporary files": stream * streams if stream > _budget(config) else 0}
    scoring = _scoring_bytes(dense, config, size, weights)
    refit = _refit_bytes(dense, pruned, config, size) if config.reconstruct.enabled else 0
    parts = {
        "dense weights": weights,
        "pruned weights": copy,
        "activations of one batch": size.batch * live_features(dense),
        f"scoring ({config.structured.score})": scoring,
        "refit": refit,
        "hidden states": min(stream, _budget(config)) * streams,
    }
    working = parts["activations of one batch"] + max(scoring, refit)
    shard = min(dense.model.num_parameters() * stored.itemsize, LARGEST_SHARD)
    if not accelerator:
        parts["peak host"] = max(weights + shard, weights + copy + parts["hidden states"] + working) + RUNTIME_BYTES
        return parts | files
    at_home = weights + copy  # in host memory with offload, on the device without
    parts |= transfers(dense, config, size.batch * dense.hidden_size, streams, dtype)
    parts["peak host"] = max(shard, parts["hidden states"] + parts["pinned buffers"]) + RUNTIME_BYTES
    parts["peak host"] += at_home if offload else 0
    parts["peak device"] = (parts["layers under way"] if offload else at_home) + parts["batches under way"] + working
    return parts | files


def transfers(adapter: Adapter, config: Config, batch: int, streams: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of what copies to and from an accelerator hold, by part.

    Args:
        batch: bytes of one batch's hidden states. Where copies overlap the computation, the next one and the last one
            of each of `streams` stores are on the device.
    """
    memory = config.memory
    layer = max(p.numel() for p in adapter.model.parameters()) * dtype.itemsize
    layers = 0 if not memory.offload else 2 * layer if memory.overlap else layer  # the present one, and the next
    found = {"pinned buffers": PINNED_BYTES, "batches under way": 2 * batch * streams}
    return (found if memory.overlap else dict.fromkeys(found, 0)) | {"layers under way": layers}


@dataclass(frozen=True)
class Tokens:
    """Tokens of a run, noisy copies counted: of all windows, and of one batch; or bytes of one feature of them."""

    all: int
    batch: int

    @classmethod
    def of(cls, config: Config) -> "Tokens":
        settings = config.calibration
        each = max(1, settings.steps // settings.interval) * settings.length  # of one window
        return cls((settings.windows + settings.held_out) * each, settings.batch * each)

    def scaled(self, factor: int) -> "Tokens":
        return Tokens(self.all * factor, self.batch * factor)


def _budget(config: Config) -> int:
    return int(config.memory.budget_gb * 1e9)


def _consumer_widths(adapter: Adapter) -> list[tuple[int, int]]:
    return [(block["attention_output"].in_features, block["down"].in_features) for block in adapter.blocks]


def _scoring_bytes(dense: Adapter, config: Config, size: Tokens, weights: int) -> int:
    """Of the statistics that the score needs, beside weights, hidden states and one batch's activations."""
    widths, settings = _consumer_widths(dense), config.structured
    needs = CRITERIA[settings.score].needs
    if needs == "grams":  # fp32 Gram of both consumers, and three fp64 copies while the wider is inverted
        return max(4 * (a * a + b * b) + 24 * max(a, b) ** 2 for a, b in widths)
    if needs == "gradients":  # their running sum, the new ones, and every block's activations for the backward pass
        return 2 * weights + len(widths) * size.batch * live_features(dense)
    if needs == "moments" and needs_sinks(resolve_arm(settings.score, settings.arm), config.sink):
        # every consumer's input until the batch has ended
        held = size.batch * sum(a + b for a, b in widths)
        return held if held <= _budget(config) else 0
    return 0


def _refit_bytes(dense: Adapter, pruned: Adapter, config: Config, size: Tokens) -> int:
    """fp32 and fp64 Grams of fit and held-out rows, a solve, held targets, and the consumer's input in turn."""
    settings, windows = config.structured, config.calibration.windows + config.calibration.held_out
    # under `global` a block may keep everything
    side = dense if settings.allocation == "global" else pruned
    kept = max(block["down"].in_features for block in side.blocks)
    targets = size.all * 2 * len(dense.blocks) * dense.hidden_size
    one = size.all * max(max(pair) for pair in _consumer_widths(side))
    split = 0  # the measured split holds targets of its own
    if settings.split == "measured":
        split = targets * min(settings.split_windows + config.calibration.held_out, windows) // windows
    held = sum(part for part in (targets, split, one) if part <= _budget(config))
    return 24 * kept * kept + 16 * kept * (kept + dense.hidden_size) + held


def _block_numbers(adapter: Adapter) -> list[int]:
    return [sum(p.numel() for p in block.module.parameters()) for block in adapter.blocks]


def live_features(adapter: Adapter) -> int:
    """Features per token alive at once in a block or the head: the wider of the MLP's three and the logits' two."""
    mlp = max(3 * block.widths.channels for block in adapter.blocks)
    return max(mlp + 2 * adapter.hidden_size, adapter.vocabulary)  # at most half of all tokens are masked, x 2 in fp32
