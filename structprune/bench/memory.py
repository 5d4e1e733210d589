"""Peak memory: of this process so far, and predicted for a run."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from structprune.bench.disk_memory import DiskWeights
from structprune.levels.cost import search_cost
from structprune.models.adapter import Adapter, BlockView, ExpertWidths
from structprune.models.logits import LOGIT_BYTES
from structprune.models.resources import Resources
from structprune.models.transfer import PINNED_BYTES
from structprune.statistics.gradients import recomputes, saved_bytes
from structprune.statistics.moments import held_input_bytes
from structprune.statistics.rows import needs_sinks
from structprune.structured.request import StructuredRequest
from structprune.structured.units import block_tensors

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


def predicted_peak(dense: Adapter, pruned: Adapter, request: StructuredRequest, stored: torch.dtype) -> dict[str, int]:
    """Predicted peak memory of a structured run, in bytes, by part and in total.

    Args:
        dense, pruned: adapters of meta models before and after.
        stored: dtype of the checkpoint's weights.
    Returns:
        Weights, hidden states, and what each phase that can be the peak needs beside them (scoring, refit, held-out
        check; all with the activations of a forward pass); "peak host" over them and the loading of weights, with an
        accelerator "peak device", and on disk "temporary files". Hidden states and held activations beyond
        `memory.budget_gb` go to files or are computed again, so they are capped.
    """
    resources, refits = request.resources, request.reconstruct.enabled
    dtype, budget = resources.weight_dtype(stored), resources.budget
    shared = sum(p.numel() for p in pruned.model.parameters()) - sum(_block_numbers(pruned))
    size = Tokens.of(request, dense).scaled(dtype.itemsize)
    at_once = size.once * _pass_features(dense, dtype)
    weights = dense.model.num_parameters() * dtype.itemsize
    copy = (pruned.model.num_parameters() - shared) * dtype.itemsize
    stream, streams = size.all * dense.hidden_size, 2 if refits else 1
    files = {"temporary files": stream * streams if stream > budget else 0}
    phases = {
        f"scoring ({request.settings.score})": _scoring_bytes(dense, request, size, dtype, at_once),
        "refit": _refit_bytes(dense, pruned, request, size, at_once, dtype) if refits else 0,
        "held-out check": at_once + _logit_bytes(pruned, dtype, size.once // dtype.itemsize),
    }
    if request.config.search.enabled:  # beside the ranking's model; at the end there are two pruned ones
        uncut = search_cost(dense, request, dtype.itemsize).memory
        phases["search"] = max(uncut + phases["refit"], copy + max(phases["refit"], phases["held-out check"]))
    parts = {"dense weights": weights, "pruned weights": copy, **phases}
    parts["hidden states"] = min(stream, budget) * streams
    if resources.on_disk:  # a cut weight is as it was stored, a refitted one as it was computed
        files["temporary files"] += copy if refits else copy // dtype.itemsize * stored.itemsize
        parts |= transfers(dense, resources, size.once * dense.hidden_size, streams, dtype)
        return _disk_peak(parts, phases, DiskWeights(dense, dtype, stored), request) | files
    working = max(phases.values())
    shard = min(dense.model.num_parameters() * stored.itemsize, LARGEST_SHARD)
    if not resources.accelerator:
        parts["peak host"] = max(weights + shard, weights + copy + parts["hidden states"] + working) + RUNTIME_BYTES
        return parts | files
    at_home = weights + copy  # in host memory with offload, on the device without
    parts |= transfers(dense, resources, size.once * dense.hidden_size, streams, dtype)
    parts["peak host"] = max(shard, parts["hidden states"] + parts["pinned buffers"]) + RUNTIME_BYTES
    parts["peak host"] += at_home if resources.offload else 0
    parts["peak device"] = parts["layers under way"] if resources.offload else at_home
    parts["peak device"] += parts["batches under way"] + working
    return parts | files


def _disk_peak(
    parts: dict[str, int], phases: dict[str, int], weights: DiskWeights, request: StructuredRequest
) -> dict[str, int]:
    """The parts and peaks of a run whose weights stay on disk.

    Args:
        parts: those of a run that holds its weights, with what copies to an accelerator hold.
    """
    parts = {name: size for name, size in (parts | weights.parts).items() if not name.endswith(" weights")}
    blocks = max(size for name, size in phases.items() if name != "held-out check")
    if request.reconstruct.enabled and request.reconstruct.head:  # the head's weight, before and after
        blocks = max(blocks, 2 * weights.adapter.vocabulary * weights.adapter.hidden_size * weights.dtype.itemsize)
    check, moved = phases["held-out check"], parts["batches under way"]
    aside = parts["hidden states"] + parts["pinned buffers"] + RUNTIME_BYTES
    return parts | weights.peaks(request.resources, blocks + moved, check + moved, aside)


def transfers(adapter: Adapter, resources: Resources, batch: int, streams: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that copies to and from an accelerator hold, by part.

    Args:
        batch: bytes of one batch's hidden states. Where copies overlap the computation, the next one and the last one
            of each of `streams` stores are on the device.
    """
    layer = max(p.numel() for p in adapter.model.parameters()) * dtype.itemsize
    layers = 0 if not resources.offload else 2 * layer if resources.overlap else layer  # the current one, and the next
    buffers = {"pinned buffers": PINNED_BYTES, "batches under way": 2 * batch * streams}
    return (buffers if resources.overlap else dict.fromkeys(buffers, 0)) | {"layers under way": layers}


@dataclass(frozen=True)
class Tokens:
    """Tokens of a run's rows, noisy copies counted, or bytes of one feature of them.

    Attributes:
        all: of all windows. batch: of `calibration.batch` whole windows.
        once: of a forward pass that need not see whole windows (`Limits.sequences`).
    """

    all: int
    batch: int
    once: int

    @classmethod
    def of(cls, request: StructuredRequest, adapter: Adapter) -> "Tokens":
        settings = request.calibration
        copies, length = max(1, settings.noisy_copies), settings.length * adapter.model.layout.copies
        windows, once = settings.windows + settings.held_out, request.limits.sequences(copies, length)
        return cls(windows * copies * length, settings.batch * copies * length, once * length)

    def scaled(self, factor: int) -> "Tokens":
        return Tokens(self.all * factor, self.batch * factor, self.once * factor)


def _consumer_widths(adapter: Adapter) -> list[tuple[int, int]]:
    """Columns of both consumers of every block, 0 where there is none."""
    return [(block.widths.query_heads * block.head_dim, block.widths.channels) for block in adapter.blocks]


def _scoring_bytes(dense: Adapter, request: StructuredRequest, size: Tokens, dtype: torch.dtype, at_once: int) -> int:
    """What the score needs beside weights and hidden states; `at_once`: activations of a pass of `size.once`."""
    widths, needs = _consumer_widths(dense), request.score.needs
    if needs == "weights":
        return 0
    if needs == "grams":
        parts = [(mixed, *_mlp_widths(block)) for (mixed, _), block in zip(widths, dense.blocks)]
        return max(_gram_bytes(dense, each, at_once) for each in parts)
    if needs == "gradients":
        return _gradient_bytes(dense, request, dtype)
    whole = size.batch * _pass_features(dense, dtype)
    if needs_sinks(request.arm, request.sink):
        held = held_input_bytes(dense, size.batch // dtype.itemsize, dtype.itemsize)
        return whole + (held if held <= request.resources.budget else 0)
    return whole


def _gram_bytes(dense: Adapter, widths: Sequence[int], at_once: int) -> int:
    """The Grams of a block: in fp64 beside a pass and the widest's fp32 copy, then in fp32 while it is inverted."""
    numbers, widest = sum(width * width for width in widths), max(widths)
    return max(8 * numbers + at_once + 4 * widest * widest, 4 * numbers + _inversion_bytes(dense, widest))


def _gradient_bytes(dense: Adapter, request: StructuredRequest, dtype: torch.dtype) -> int:
    """fp32 sums and the widest new gradient, beside a backward pass."""
    linears = [value for block in dense.blocks for value in block_tensors(block).values()]
    sums = 4 * sum(value.numel() for value in linears) + dtype.itemsize * max(value.numel() for value in linears)
    return sums + _backward_bytes(dense, request, dtype)


def _backward_bytes(dense: Adapter, request: StructuredRequest, dtype: torch.dtype) -> int:
    """What blocks hold for the backward pass, or their inputs, one block's and its gradients where they are computed
    again; and the slice of logits."""
    tokens = Tokens.of(request, dense).once
    held = [tokens * saved_bytes(block, dtype) for block in dense.blocks]
    if recomputes(dense.blocks, tokens, dtype, request.resources.budget):
        live = (len(held) + 1) * tokens * dense.hidden_size * dtype.itemsize + 2 * max(held)
    else:
        live = sum(held) + max(held)
    return live + LOGIT_BYTES


def _inversion_bytes(adapter: Adapter, width: int) -> int:
    """fp64: the inverse Gram matrix and two copies of it, the weight and a copy."""
    return 24 * width * width + 16 * width * adapter.hidden_size


def _refit_bytes(
    dense: Adapter, pruned: Adapter, request: StructuredRequest, size: Tokens, at_once: int, dtype: torch.dtype
) -> int:
    """The larger of what a consumer needs, products of fit and held-out rows (fp64 beside a pass, fp32 beside a solve)
    and its input; and what producers need, where they are refitted. Beside either, held targets."""
    settings, text = request.settings, request.calibration
    windows = text.windows + text.held_out
    # under `global` a block may keep everything
    side = dense if settings.allocation == "global" else pruned
    remaining, outputs = max(max(_mlp_widths(block)) for block in side.blocks), dense.hidden_size
    targets = size.all * sum(len(block.kinds) for block in dense.blocks) * dense.hidden_size
    one = size.all * max(max(pair) for pair in _consumer_widths(side))
    split = 0  # the measured split holds targets of its own, as does a search for blocks to drop
    if settings.split == "measured" or request.config.drops_blocks:
        split = targets * min(settings.split_windows + text.held_out, windows) // windows
    targets, split, one = (part if part <= request.resources.budget else 0 for part in (targets, split, one))
    # fp64: a factor beside what it is made of or its copy; the weight, the best one, and the gap, twice, with what it
    # becomes. Measured on CPU at K = 2048
    solve = 16 * remaining * remaining + 40 * remaining * outputs
    sums = max(_consumer_sums(block, outputs) for block in side.blocks)
    consumer = max(16 * sums + at_once + 4 * remaining * remaining, 8 * sums + solve) + one
    producers = _producer_bytes(side, at_once) if request.reconstruct.producers else 0
    walked = max(consumer, producers) + targets + split
    if request.reconstruct.weighting != "gradient":
        return walked
    return max(walked, _backward_bytes(dense, request, dtype))  # before the walk


def _consumer_sums(block: BlockView, outputs: int) -> int:
    """Numbers of a Gram matrix and a target of a block's MLP; all parts of a mixture are summed at once."""
    return sum(width * (width + outputs) for width in _mlp_widths(block))


def _mlp_widths(block: BlockView) -> list[int]:
    """Channels of a block's MLP, or of every part of its mixture; 0 where there is none."""
    widths = block.widths
    if not isinstance(widths, ExpertWidths) or not block.mixture:
        return [widths.channels]
    return [widths.channels] * widths.experts + [widths.shared] * (widths.shared > 0)


def _producer_bytes(side: Adapter, at_once: int) -> int:
    """Gram and cross products, C x C, of fit and held-out rows, which linears share: in fp64 beside a pass, then in
    fp32 beside a solve with its fp64 products. Measured on CPU at C = 1536 and 2048, O from C / 3 to 3 C."""
    inputs, outputs = side.hidden_size, max(max(pair) for pair in _consumer_widths(side))
    return max(32 * inputs * inputs + at_once, 48 * inputs * inputs + 64 * inputs * outputs)


def _logit_bytes(pruned: Adapter, dtype: torch.dtype, tokens: int) -> int:
    """Logits of at most all `tokens`, as they are, in fp32, and normalised."""
    rows = min(tokens, max(1, LOGIT_BYTES // (8 * pruned.vocabulary)))
    return rows * pruned.vocabulary * (8 if dtype == torch.float32 else 8 + dtype.itemsize)


def _block_numbers(adapter: Adapter) -> list[int]:
    return [sum(p.numel() for p in block.module.parameters()) for block in adapter.blocks]


def _pass_features(adapter: Adapter, dtype: torch.dtype) -> int:
    """Features per token alive at once in a block, with those made of a consumer's input for its weighted products.

    Three of the MLP's (gate, up and what they become), or its input and, of half-precision rows, an fp32 product with
    the weights and its two terms; of the stream what comes in, goes on, and its squares in fp32.
    """
    mlp, stream = (3, 4) if dtype == torch.float32 else (5, 6)
    return max(mlp * block.widths.channels for block in adapter.blocks) + stream * adapter.hidden_size


def live_features(adapter: Adapter) -> int:
    """Features per token alive at once in a block or the head: the wider of the MLP's three and the logits' two."""
    mlp = max(3 * block.widths.channels for block in adapter.blocks)
    return max(mlp + 2 * adapter.hidden_size, adapter.vocabulary)  # at most half of all tokens are masked, x 2 in fp32
