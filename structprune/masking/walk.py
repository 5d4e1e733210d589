"""A model walked block by block over stores of hidden states, beside its dense original.

Two streams at most: `prefix`, what the masked model hands on, and `dense`, what the dense model hands on. Scores look
at a block that is dense still; the refit of a linear looks at what the linears before it in the block make of their
inputs with the weights they have now. One block's statistics are in memory at a time.
"""

from dataclasses import dataclass

import torch

from structprune.models.adapter import READERS, Adapter, BlockView
from structprune.models.transfer import send
from structprune.refit.products import InputProducts, RowSums
from structprune.statistics.activations import add_gram, mirror, relative_weight
from structprune.statistics.hidden import HiddenStates
from structprune.statistics.inputs import STREAM, InputNorms, Inputs, block_inputs, read_input


@dataclass(frozen=True)
class Use:
    """Rows that one purpose looks at: neighbouring sequences and their weights ω (R, T), or None for ones."""

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
class Wanted:
    """What a walk measures.

    Attributes:
        ids: (R, T) int64 all sequences.
        score: rows of the score, and `norms` ("joint", "summed") or None for Grams; None where nothing is scored.
        score_relative, fit_relative: divide row weights by the RMS of the stream an output is added to.
        on_dense: the score looks at the dense stream (one-shot).
        fit, check: rows of the refit and its held-out rows, none in both; None without a refit.
        target_dense: the refit aims at the dense model's outputs, not at the layer's.
    """

    ids: torch.Tensor
    score: Use | None = None
    norms: str | None = None
    score_relative: bool = False
    on_dense: bool = False
    fit: Use | None = None
    check: Use | None = None
    fit_relative: bool = True
    target_dense: bool = True

    @property
    def purposes(self) -> list[Use]:
        """Rows of the refit."""
        return [use for use in (self.fit, self.check) if use is not None]


class Walk:
    """The streams of one run. For every block in order: `measure`; for every input in the order of `READERS`, with a
    refit, `products`, then put the new weights of what reads it in place; `advance`.

    Args:
        dense: of the dense model, whose blocks stay as they are until `advance` has left them.
        adapter: of the model that is masked, block by block.
        batch: sequences in a forward pass.
        budget: bytes of hidden states to hold in memory; beyond it they are in a file.
        overlap: on an accelerator they are copied while others are computed with.
    """

    def __init__(
        self, dense: Adapter, adapter: Adapter, wanted: Wanted, batch: int, budget: int, overlap: bool = False
    ):
        self._original, self._adapter, self._wanted, self._batch = dense, adapter, wanted, batch
        scored = [wanted.score] if wanted.score is not None else []
        uses = scored + wanted.purposes
        self._edges = sorted({edge for use in uses for edge in (use.rows.start, use.rows.stop)})
        prefix = wanted.purposes + ([] if wanted.on_dense else scored)
        aimed = (wanted.purposes if wanted.target_dense else []) + (scored if wanted.on_dense else [])
        self._prefix = _Stream.of(adapter, wanted.ids, prefix, batch, budget, overlap)
        self._dense = _Stream.of(dense, wanted.ids, aimed, batch, budget, overlap)

    def _slices(self, use: Use | None = None):
        """Batches of rows: all, or those of one use; none is in two uses by a part only."""
        for start, stop in zip(self._edges, self._edges[1:]):
            if use is None or use.covers(slice(start, stop)):
                for first in range(start, stop, self._batch):
                    yield slice(first, min(first + self._batch, stop))

    def _refitted(self, rows: slice) -> bool:
        return any(use.covers(rows) for use in self._wanted.purposes)

    def _last(self, index: int) -> bool:
        return index == len(self._adapter.blocks) - 1

    @torch.inference_mode()
    def measure(self, index: int) -> dict[str, torch.Tensor]:
        """Statistics of the score: input -> norms (C,) or Gram (C, C), of a block that is dense still; empty where
        nothing is scored."""
        wanted, device = self._wanted, self._adapter.device
        if wanted.score is None:
            return {}
        stream = self._dense if wanted.on_dense else self._prefix
        norms = InputNorms(wanted.norms == "summed") if wanted.norms else None
        grams: dict[str, torch.Tensor] = {}
        for rows in self._slices(wanted.score):
            # a dense stream that no refit looks at moves on with the pass that is made anyway
            move = wanted.on_dense and not self._last(index) and not (wanted.target_dense and self._refitted(rows))
            seen = stream.inputs(self._original.blocks[index], rows, move)
            weight = wanted.score.part(rows, device)  # (b, T)
            for name, x in seen.read.items():
                omega = seen.weight(name, weight, wanted.score_relative)  # (b, T)
                if norms:
                    norms.add(name, x, omega)
                else:
                    size = x.shape[-1]
                    add_gram(grams.setdefault(name, torch.zeros(size, size, device=device)), x, omega)
        return norms.norms if norms else {name: mirror(gram) for name, gram in grams.items()}

    @torch.inference_mode()
    def products(self, index: int, name: str) -> tuple[InputProducts, InputProducts]:
        """What the refit of the linears that read an input needs, over its rows and over the held-out ones.

        The linears of the block before them have their new weights. The streams move along: `mlp_input` takes the
        prefix behind attention, `mixed` and `activated` take the dense stream behind attention and behind the block.
        """
        wanted, block, dense = self._wanted, self._adapter.blocks[index], self._original.blocks[index]
        linears = {role: dense[role] for role in READERS[name]}
        found = []
        for use in (wanted.fit, wanted.check):
            sums = RowSums(linears, self._adapter.device, wanted.target_dense, use is wanted.check)
            for rows in self._slices(use):
                x = self._prefix.behind_attention(block, rows) if name == "mlp_input" else self._prefix.read(rows)
                omega = use.part(rows, self._adapter.device)  # (b, T)
                omega = relative_weight(x, omega) if wanted.fit_relative and name in STREAM else omega  # (b, T)
                hat = read_input(block, name, x, self._prefix.rotary)  # (b, T, C)
                aim = self._dense.step(dense, name, rows) if wanted.target_dense else None  # (b, T, C)
                sums.add(hat, aim, omega)
            found.append(sums.finish())
        return tuple(found)

    @torch.inference_mode()
    def advance(self, index: int) -> None:
        """Move the prefix stream on through a block, with the weights it has now; behind the last nobody reads it."""
        if self._prefix is None or self._last(index):
            return
        block = self._adapter.blocks[index]
        for rows in self._slices():
            self._prefix.leave(block, rows, self._refitted(rows))


class _Stream:
    """Hidden states of some neighbouring sequences, before a block or within it; `limits` as of `HiddenStates`."""

    def __init__(self, adapter: Adapter, ids: torch.Tensor, rows: slice, *limits):
        self.rows = rows
        self._states = HiddenStates(adapter, ids[rows], *limits)
        self.rotary = self._states.rotary

    @classmethod
    def of(cls, adapter: Adapter, ids: torch.Tensor, uses: list[Use], *limits) -> "_Stream | None":
        """A stream from the first sequence that a use looks at to the last; None where none does."""
        if not uses:
            return None
        rows = slice(min(use.rows.start for use in uses), max(use.rows.stop for use in uses))
        return cls(adapter, ids, rows, *limits)

    def _own(self, rows: slice) -> slice:
        return slice(rows.start - self.rows.start, rows.stop - self.rows.start)

    def read(self, rows: slice) -> torch.Tensor:
        """(b, T, C); on CPU the store itself, which `_write` changes."""
        return self._states.read(self._own(rows))

    def _write(self, rows: slice, states: torch.Tensor) -> None:
        self._states.write(self._own(rows), states)

    def inputs(self, block: BlockView, rows: slice, move: bool = False) -> Inputs:
        """What the block's linears read; with `move` the stream is the block's output afterwards."""
        states = self.read(rows)  # (b, T, C)
        found = block_inputs(block, states.clone() if move else states, self.rotary)
        if move:
            self._write(rows, found.stream["activated"] + block["down"](found.read["activated"]))
        return found

    def behind_attention(self, block: BlockView, rows: slice) -> torch.Tensor:
        """The stream between a block's halves (b, T, C), which is kept instead of the one before the block."""
        x = self.read(rows)  # (b, T, C)
        x = x + block["attention_output"](block.module.mix(x, self.rotary))  # (b, T, C)
        self._write(rows, x)
        return x

    def step(self, block: BlockView, name: str, rows: slice) -> torch.Tensor:
        """What the linears of an input read (b, T, C); those that add to the stream do so."""
        x = self.read(rows)  # (b, T, C)
        read = read_input(block, name, x, self.rotary)  # (b, T, C)
        if name in STREAM:
            self._write(rows, x + block[READERS[name][0]](read))
        return read

    def leave(self, block: BlockView, rows: slice, half: bool) -> None:
        """Take rows behind a block: the whole of it, or its second half where they are behind the first."""
        if not self.rows.start <= rows.start < self.rows.stop:
            return
        x = self.read(rows)  # (b, T, C)
        self._write(rows, x + block["down"](block.module.activate(x)) if half else block.module(x, self.rotary))
