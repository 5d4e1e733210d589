"""A masked model and its dense original, walked block by block over stores of hidden states.

There are at most two streams of hidden states: `prefix`, from the masked model, and `dense`, from the dense model.
Scores read a block that is still dense; the refit of a linear reads inputs computed with the new weights of the linears
before it. One block's statistics are in memory at a time.
"""

from dataclasses import dataclass

import torch

from structprune.models.adapter import Adapter, BlockView
from structprune.models.experts_structprune import role_and_part
from structprune.models.transfer import send
from structprune.refit.products import InputProducts, RowSums
from structprune.statistics.activations import add_gram, empty_sum, mirror, relative_weight
from structprune.statistics.hidden import HiddenStates
from structprune.statistics.inputs import STREAM, InputNorms, Inputs, block_inputs, block_output
from structprune.statistics.scan import Limits
from structprune.workers import ALONE, Workers


@dataclass(frozen=True)
class Use:
    """Rows that one purpose reads: neighbouring sequences and their weights ω (R, T), None for ones."""

    rows: slice
    weight: torch.Tensor | None

    def covers(self, rows: slice) -> bool:
        return self.rows.start <= rows.start and rows.stop <= self.rows.stop

    def part(self, rows: slice, device: torch.device) -> torch.Tensor | None:
        """Weights of some of the rows on a device, (b, T)."""
        if self.weight is None:
            return None
        return send(self.weight[rows.start - self.rows.start : rows.stop - self.rows.start], device)


@dataclass(frozen=True)
class WalkPlan:
    """What a walk measures; "relative" row weights are divided by the RMS of the stream an output is added to."""

    ids: torch.Tensor  # (R, T) int64 all sequences
    score: Use | None = None  # rows of the score; None where nothing is scored
    norms: str | None = None  # "joint" or "summed" norms for the score; None for Gram matrices
    score_relative: bool = False
    on_dense: bool = False  # the score reads the dense stream (one-shot)
    fit: Use | None = None  # rows of the refit
    check: Use | None = None  # its held-out rows, none of them in `fit`
    fit_relative: bool = True
    target_dense: bool = True  # the refit's targets are the dense model's outputs, not the layer's

    @property
    def purposes(self) -> list[Use]:
        """Rows of the refit."""
        return [use for use in (self.fit, self.check) if use is not None]


class Walk:
    """The streams of one run.

    Call for every block in order: `measure`; with a refit, for every input in the order of `BlockView.readers`,
    `products`, and install the new weights of its readers; then `advance`.

    Args:
        dense: of the dense model, whose blocks must not change until `advance` has passed them.
        adapter: of the model that is masked, block by block.
        limits: sequences per forward pass (`batch`), and memory for hidden states.
        workers: whose rows are summed; the plan has this process's.
    """

    def __init__(self, dense: Adapter, adapter: Adapter, plan: WalkPlan, limits: Limits, workers: Workers = ALONE):
        self._original, self._adapter, self._plan, self._workers = dense, adapter, plan, workers
        self._batch = batch = limits.sequences(1, plan.ids.shape[1])
        scored = [plan.score] if plan.score is not None else []
        self._edges = sorted({edge for use in scored + plan.purposes for edge in (use.rows.start, use.rows.stop)})
        prefix = plan.purposes + ([] if plan.on_dense else scored)
        target = (plan.purposes if plan.target_dense else []) + (scored if plan.on_dense else [])
        store = (batch, limits.budget, limits.overlap)
        self._prefix = _Stream(adapter, plan.ids, prefix, *store) if prefix else None
        self._dense = _Stream(dense, plan.ids, target, *store) if target else None

    def _slices(self, use: Use | None = None):
        """Batches of rows: all, or those of one use; no batch belongs to a use in part only."""
        for start, stop in zip(self._edges, self._edges[1:]):
            if use is None or use.covers(slice(start, stop)):
                for first in range(start, stop, self._batch):
                    yield slice(first, min(first + self._batch, stop))

    def _refitted(self, rows: slice) -> bool:
        return any(use.covers(rows) for use in self._plan.purposes)

    def _last(self, index: int) -> bool:
        return index == len(self._adapter.blocks) - 1

    @torch.inference_mode()
    def measure(self, index: int) -> dict[str, torch.Tensor]:
        """Statistics of the score for a block that is still dense: input -> norms (C,) or Gram matrix (C, C) fp32.

        Empty where nothing is scored.
        """
        plan, device = self._plan, self._adapter.device
        if plan.score is None:
            return {}
        stream = self._dense if plan.on_dense else self._prefix
        assert stream is not None  # there is one for every use
        norms = InputNorms(plan.norms == "summed") if plan.norms else None
        grams: dict[str, torch.Tensor] = {}
        for rows in self._slices(plan.score):
            # a dense stream that no refit reads advances with this pass
            move = plan.on_dense and not self._last(index) and not (plan.target_dense and self._refitted(rows))
            inputs = stream.inputs(self._original.blocks[index], rows, move)
            weight = plan.score.part(rows, device)  # (b, T)
            for name, x in inputs.read.items():
                omega = inputs.weight(name, weight, plan.score_relative)  # (b, T)
                if norms:
                    norms.add(name, x, omega, inputs.sequences(name))
                else:
                    size = x.shape[-1]
                    add_gram(grams.setdefault(name, empty_sum(size, size, device)), x, omega)
        if norms:
            return norms.norms(self._workers)
        self._workers.add_up(*grams.values())
        for name, gram in grams.items():  # one by one: a copy of all in fp32 would add to the peak of memory
            grams[name] = mirror(gram).float()
        return grams

    @torch.inference_mode()
    def products(self, index: int, name: str) -> tuple[InputProducts, InputProducts]:
        """The products for refitting the linears that read an input, over its rows and over held-out rows.

        Earlier linears of the block already have their new weights. The streams advance: the MLP's first input takes
        the prefix past attention; `mixed` and the MLP's last one take the dense stream past attention and past the
        block. An expert is fitted on the tokens that it sees in the masked model.
        """
        plan, block, dense = self._plan, self._adapter.blocks[index], self._original.blocks[index]
        linears = {role: dense[role] for role in dense.readers[name]}
        prefix, products = self._prefix, []
        assert prefix is not None and plan.fit is not None and plan.check is not None, "the walk plans no refit"
        for use in (plan.fit, plan.check):
            sums = RowSums(linears, self._adapter.device, plan.target_dense, use is plan.check)
            for rows in self._slices(use):
                x = prefix.after_attention(block, rows) if name == block.mlp_start else prefix.read(rows)  # (b, T, C)
                omega = use.part(rows, self._adapter.device)  # (b, T)
                scaled = plan.fit_relative and role_and_part(name)[0] in STREAM
                omega = relative_weight(x, omega) if scaled else omega  # (b, T)
                tokens = block.tokens(name, x)  # (m,) of an expert, else all
                if tokens is not None and omega is not None:
                    omega = omega.flatten()[tokens]  # (m,)
                pruned = block.read(name, x, prefix.context, tokens)  # (b, T, C) or (m, C)
                stream = self._dense if plan.target_dense else None
                source = stream.step(dense, name, rows, tokens) if stream else None  # as `pruned`
                sums.add(pruned, source, omega)
            products.append(sums.finish(self._workers))
        fit, check = products
        return fit, check

    @torch.inference_mode()
    def advance(self, index: int) -> None:
        """Advance the prefix stream through a block with its new weights; after the last block nothing reads it."""
        if self._prefix is None or self._last(index):
            return
        block = self._adapter.blocks[index]
        for rows in self._slices():
            self._prefix.pass_block(block, rows, block.mlp_start is not None and self._refitted(rows))

    @torch.inference_mode()
    def skip(self, index: int) -> None:
        """Advance both streams through a block whose masks are there already, instead of all other calls for it."""
        if self._last(index):
            return
        for stream, adapter in ((self._prefix, self._adapter), (self._dense, self._original)):
            if stream is not None:
                for rows in self._slices():
                    stream.pass_block(adapter.blocks[index], rows, half=False)


class _Stream:
    """Hidden states of the sequences from the first that a use reads to the last, before a block or within it.

    Args:
        limits: as in `HiddenStates`.
    """

    def __init__(self, adapter: Adapter, ids: torch.Tensor, uses: list[Use], *limits):
        self.rows = slice(min(use.rows.start for use in uses), max(use.rows.stop for use in uses))
        self._states = HiddenStates(adapter, ids[self.rows], *limits)
        self.context = self._states.context

    def _own(self, rows: slice) -> slice:
        return slice(rows.start - self.rows.start, rows.stop - self.rows.start)

    def read(self, rows: slice) -> torch.Tensor:
        """(b, T, C); on CPU the store itself, which `_write` changes."""
        return self._states.read(self._own(rows))

    def _write(self, rows: slice, states: torch.Tensor) -> None:
        self._states.write(self._own(rows), states)

    def inputs(self, block: BlockView, rows: slice, move: bool = False) -> Inputs:
        """The inputs of the block's linears; with `move` the stream becomes the block's output."""
        states = self.read(rows)  # (b, T, C)
        inputs = block_inputs(block, states.clone() if move else states, self.context)
        if move:
            self._write(rows, block_output(block, inputs))
        return inputs

    def after_attention(self, block: BlockView, rows: slice) -> torch.Tensor:
        """The stream between a block's halves (b, T, C), which replaces the one before the block."""
        x = block.module.add_attention(self.read(rows), *self.context)  # (b, T, C)
        self._write(rows, x)
        return x

    def step(self, block: BlockView, name: str, rows: slice, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """One input of the block's linears (b, T, C); after it the stream is past the half that it ends.

        Args:
            tokens: of an expert's input, which is then (m, C).
        """
        x = self.read(rows)  # (b, T, C)
        read = block.read(name, x, self.context, tokens)  # (b, T, C) or (m, C)
        if block.mixture and name == block.mlp_end:
            self._write(rows, block.module.add_mlp(x))
        elif name in STREAM:
            self._write(rows, x + block[block.readers[name][0]](read))
        return read

    def pass_block(self, block: BlockView, rows: slice, half: bool) -> None:
        """Take rows past a block, or past its second half where they have passed the first."""
        if not self.rows.start <= rows.start < self.rows.stop:
            return
        x = self.read(rows)  # (b, T, C)
        self._write(rows, block.module.add_mlp(x) if half else block.module(x, *self.context))
