"""Gradients of the masked-diffusion loss summed over a calibration set, in bounded memory.

Shapes: R rows (noisy copies of windows), b rows of a pass, T tokens, M masked ones, C features, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from structprune.models.adapter import BlockView
from structprune.models.encode import next_tokens, predicting
from structprune.models.experts_structprune import ExpertBlock
from structprune.models.logits import logit_slices
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.transfer import send
from structprune.statistics.rows import Rows
from structprune.statistics.scan import Scan
from structprune.workers import Workers


def saved_bytes(block: BlockView, dtype: torch.dtype) -> int:
    """Bytes per token that a block's forward pass saves for its backward pass.

    Each norm saves its input and root mean square in fp32, and its output; a norm of heads the former two. Attention
    saves queries, keys and values of every head, its output and the log-sum-exp. The MLP saves the gate before and
    after the activation, up, and their product.
    """
    total = 4 * block.widths.query_heads
    for role in block.consumers:
        size, units = block[role].out_features, block[role].in_features
        total += (size + 4 * units) * dtype.itemsize + 4 * (size + 1)
    if block.mixture:
        total += _mixture_bytes(block, block.mixture, dtype)
    if "query_norm" in block.module.roles:
        total += 4 * (block.widths.query_heads + block.widths.kv_heads) * (block.head_dim + 1)
    return total


def _mixture_bytes(block: BlockView, mixture: ExpertBlock, dtype: torch.dtype) -> int:
    """Of a mixture: the norm, all experts' shares, and for each expert of a token its row, MLP and output in fp32."""
    size, units = block["down.0"].out_features, block.widths.channels
    own = (size + 4 * units) * dtype.itemsize + 4 * size
    return (size * dtype.itemsize + 4 * (size + 1)) + 8 * mixture.experts + mixture.top_k * own


def recomputes(blocks: Sequence[BlockView], tokens: int, dtype: torch.dtype, budget: int) -> bool:
    """Whether the backward pass computes blocks again, because what all of them save exceeds the budget."""
    return tokens * sum(saved_bytes(block, dtype) for block in blocks) > budget


def gradient_sums(
    scan: Scan, rows: Rows, parameters: Sequence[torch.Tensor], title: str = "gradients"
) -> list[torch.Tensor]:
    """fp32 sums of the gradients of Σ ω CE / p over masked tokens, divided by the number of all tokens.

    Where rows hold text that is read causally, `scan.causal` times Σ ω CE of its next tokens is added to that sum.

    Only one parameter's gradient is alive beside the sums, and the LM head runs on a slice of the masked tokens at a
    time. Sums in half precision would lose what each pass adds. Gradients that parameters already had are kept. Blocks
    whose saved activations exceed the scan's budget are computed again in the backward pass.

    Args:
        rows: all noisy copies of the scan's windows, of an arm with a loss.
    """
    adapter, batch = scan.adapter, scan.sequences(rows.copies)
    tokens = min(batch, len(rows.ids)) * rows.ids.shape[1]
    again = recomputes(adapter.blocks, tokens, adapter.model.dtype, scan.limits.budget)
    count = _count_all(rows, scan.workers)
    with torch.enable_grad(), _summed(adapter.model, parameters) as sums:
        for start in scan.track(range(0, len(rows.ids), batch), title):
            _backward(scan, rows, slice(start, start + batch), again, count)
    scan.workers.add_up(*sums)
    return sums


def gradient_norms(
    scan: Scan, rows: Rows, linears: Sequence[nn.Linear], title: str = "gradients"
) -> list[torch.Tensor]:
    """Squared norms of the gradient of the loss of `gradient_sums` with respect to each linear's output.

    Args:
        rows: as for `gradient_sums`.
        linears: of the scan's model, whose outputs (b, T, O) a forward pass computes once each.
    Returns:
        (R, T) fp32 on CPU for every linear, relative to the mean loss of a token.
    """
    adapter, batch = scan.adapter, scan.sequences(rows.copies)
    tokens = min(batch, len(rows.ids)) * rows.ids.shape[1]
    again = recomputes(adapter.blocks, tokens, adapter.model.dtype, scan.limits.budget)
    norms = [torch.zeros(rows.ids.shape) for _ in linears]  # (R, T) each
    part, count = slice(0), _count_all(rows, scan.workers)

    def record(total: torch.Tensor):
        def read(_module: nn.Module, _inputs: object, outputs: tuple) -> None:
            total[part] = outputs[0].float().pow(2).sum(-1).cpu()  # (b, T)

        return read

    with torch.enable_grad(), _summed(adapter.model, []), ExitStack() as stack:
        for linear, total in zip(linears, norms):
            stack.callback(linear.register_full_backward_hook(record(total)).remove)
        for start in scan.track(range(0, len(rows.ids), batch), title):
            part = slice(start, start + batch)
            _backward(scan, rows, part, again, count)
    return norms


def _count_all(rows: Rows, workers: Workers) -> int:
    """The number of rows of all processes, of which these are one's."""
    return sum(workers.gather(len(rows.ids)))


@contextmanager
def _summed(model: DiffusionLM, parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """While open, every gradient of `parameters` is added to the yielded sums and freed; no others are computed."""
    with ExitStack() as stack:
        for each in model.parameters():
            stack.callback(_restore, each, each.requires_grad, each.grad)
            each.requires_grad_(False).grad = None
        sums = [torch.zeros_like(each, dtype=torch.float32, requires_grad=False) for each in parameters]
        for parameter, total in zip(parameters, sums):
            parameter.requires_grad_(True)
            stack.callback(parameter.register_post_accumulate_grad_hook(_add_to(total)).remove)
        yield sums


def _restore(parameter: torch.Tensor, required: bool, gradient: torch.Tensor | None) -> None:
    parameter.requires_grad_(required).grad = gradient


def _add_to(total: torch.Tensor):
    @torch.no_grad()
    def fold(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # a hook after accumulation
        total.add_(parameter.grad)
        parameter.grad = None

    return fold


def _backward(scan: Scan, rows: Rows, part: slice, again: bool, count: int) -> None:
    """One pass: the loss of some rows and its gradients.

    Args:
        again: compute every block twice. count: rows of all processes, over which the loss is a mean.
    """
    adapter, calibration = scan.adapter, scan.calibration
    model, masked = adapter.model, rows.masked[part]  # (b, T)
    row, source = predicting(model, masked)  # 2 x (M,), on the host, without a device sync
    window = torch.arange(len(rows.ids))[part] // rows.copies  # (b,)
    clean = calibration.input_ids[window]  # (b, T)
    target = clean[model.layout.windows(masked)[0]]  # (M,)
    assert calibration.mask_probability is not None, "a loss needs mask probabilities"
    weight = 1 / calibration.mask_probability.flatten()[part][row]  # (M,)
    if rows.weight is not None:
        weight = weight * rows.weight[part][masked]  # (M,)
    if model.layout.causal:
        row_of, place = next_tokens(model, torch.ones_like(clean, dtype=torch.bool))  # 2 x (b (T - 1),)
        own = rows.weight
        # rows already have the root of the weight, for sums of squares
        causal = torch.full(row_of.shape, scan.causal) if own is None else own[part][row_of, place] * scan.causal**0.5
        row, source, weight = torch.cat((row, row_of)), torch.cat((source, place)), torch.cat((weight, causal))
        target = torch.cat((target, clean[:, 1:].flatten()))  # (M,), from here on of both losses
    weight = weight / (count * calibration.length)
    hidden = _encode(model, send(rows.ids[part], adapter.device), again)  # (b, T, C)
    read = hidden[send(row, adapter.device), send(source, adapter.device)]  # (M, C)
    slope = _head_slope(model.output_head, read.detach(), *(send(each, adapter.device) for each in (target, weight)))
    read.backward(slope)


def _encode(model: DiffusionLM, ids: torch.Tensor, again: bool) -> torch.Tensor:
    """Hidden states after the final norm, (b, T) -> (b, T, C); `again` holds no more of a block than its input."""
    x, context = model.embedding(ids), model.layout.context(model, ids.shape, ids.device)  # (b, T, C)
    if not x.requires_grad:  # no parameter has a gradient, but activations do
        x.requires_grad_()
    for block in model.blocks:
        x = checkpoint(block, x, *context, use_reentrant=False) if again else block(x, *context)  # (b, T, C)
    return model.final_norm(x)


def _head_slope(head: Any, read: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gradient of Σ weight · CE with respect to what the LM head reads: (M, C), (M,), (M,) -> (M, C)."""
    slope = torch.empty_like(read)
    for part in logit_slices(len(read), head.weight.shape[0], kinds=3):  # logits, log-probabilities, their gradient
        state = read[part].requires_grad_()  # (m, C)
        nats = F.cross_entropy(head(state).float(), target[part], reduction="none")  # (m,)
        (slope[part],) = torch.autograd.grad((nats * weight[part]).sum(), state)
    return slope
