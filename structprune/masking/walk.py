"""A model walked block by block over stores of hidden states: measure a still-dense block, then move on through it.

Two streams at most: `prefix`, what the masked blocks before hand on, and `dense`, what the dense model hands on. One
block's statistics are in memory at a time.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from structprune.models.adapter import READERS, Adapter, BlockView
from structprune.statistics.activations import add_gram, add_products, mirror
from structprune.statistics.hidden import HiddenStates
from structprune.statistics.inputs import InputNorms, Inputs, block_inputs
from structprune.structured.reconstruct import Products


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
        return self.weight[rows.start - self.rows.start : rows.stop - self.rows.start].to(device)


@dataclass(frozen=True)
class Wanted:
    """What a walk measures.

    Attributes:
        ids: (R, T) int64 all sequences.
        score: rows of the score, and `norms` ("joint", "summed") or None for Grams; None where nothing is scored.
        score_relative, fit_relative: divide row weights by the RMS of the stream an output is added to.
        on_dense: the score looks at the dense stream (one-shot).
        fit, check: rows of the refit and its held-out rows; None without a refit.
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


@dataclass(frozen=True)
class BlockStatistics:
    """Everything a block was measured for, as plain tensors.

    Attributes:
        score: input -> norms (C,) or Gram (C, C).
        fit, check: input -> G = X̂ᵀX̂ and C = XᵀX̂, fp32 (C, C) each; empty without a refit.
        power: role -> ‖W Xᵀ‖² over the held-out rows.
    """

    score: dict[str, torch.Tensor]
    fit: dict[str, tuple[torch.Tensor, torch.Tensor]]
    check: dict[str, tuple[torch.Tensor, torch.Tensor]]
    power: dict[str, float]

    def products(self, block: BlockView, name: str, role: str) -> tuple[Products, Products]:
        """What the refit of a role that reads `name` needs of fit and held-out rows, fp64; the block is dense still."""
        found = []
        for gram, cross in (self.fit[name], self.check[name]):
            weight = block[role].weight.detach().to(gram.device).double()  # (O, C)
            found.append(Products(gram.double(), weight @ cross.double(), self.power[role]))
        return tuple(found)


class _Products:
    """Sums of one refit purpose over a block: X̂ᵀX̂ and XᵀX̂ of every input, ‖W Xᵀ‖² of every role if asked for."""

    def __init__(self, block: BlockView, device: torch.device, cross: bool, power: bool):
        sizes = {name: block[roles[0]].in_features for name, roles in READERS.items()}
        self._block = block
        self.power = {role: 0.0 for roles in READERS.values() for role in roles} if power else None
        self._gram = {name: torch.zeros(size, size, device=device) for name, size in sizes.items()}  # (C, C)
        self._cross = {name: torch.zeros_like(gram) for name, gram in self._gram.items()} if cross else self._gram

    def add(self, hat: Inputs, dense: Inputs, weight: torch.Tensor | None, relative: bool) -> None:
        for name, roles in READERS.items():
            omega = hat.weight(name, weight, relative)  # (b, T)
            add_gram(self._gram[name], hat.read[name], omega)
            if self._cross is not self._gram:
                add_products(self._cross[name], dense.read[name], hat.read[name], omega)
            if self.power is not None:
                for role in roles:
                    output = F.linear(dense.read[name], self._block[role].weight.to(dense.read[name].device)).float()
                    output = output if omega is None else output * omega[..., None]  # (b, T, O)
                    self.power[role] += float(output.pow(2).sum())

    def finish(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Input -> G and C."""
        grams = {name: mirror(gram) for name, gram in self._gram.items()}
        return {name: (gram, self._cross[name]) for name, gram in grams.items()}


class Walk:
    """The streams of one run. For every block in order: `measure`, change its weights, `advance`.

    Args:
        batch: sequences in a forward pass.
        budget: bytes of hidden states to hold in memory; beyond it they are in a file.
    """

    def __init__(self, adapter: Adapter, wanted: Wanted, batch: int, budget: int):
        self._adapter, self._wanted, self._batch = adapter, wanted, batch
        uses = [use for use in (wanted.score, wanted.fit, wanted.check) if use is not None]
        self._edges = sorted({edge for use in uses for edge in (use.rows.start, use.rows.stop)})
        refit = [use.rows.start for use in (wanted.fit, wanted.check) if use is not None]
        prefix = refit + ([wanted.score.rows.start] if wanted.score is not None and not wanted.on_dense else [])
        dense = (refit if wanted.target_dense else []) + ([wanted.score.rows.start] if wanted.on_dense else [])
        self._prefix = _Stream.of(adapter, wanted.ids, prefix, batch, budget)
        self._dense = _Stream.of(adapter, wanted.ids, dense, batch, budget)

    def _slices(self):
        for start, stop in zip(self._edges, self._edges[1:]):
            for first in range(start, stop, self._batch):
                yield slice(first, min(first + self._batch, stop))

    @torch.inference_mode()
    def measure(self, block: BlockView) -> BlockStatistics:
        """Statistics of a block that is dense still; the dense stream moves on through it."""
        wanted, device = self._wanted, self._adapter.device
        norms = InputNorms(wanted.norms == "summed") if wanted.norms else None
        grams: dict[str, torch.Tensor] = {}
        more = block.index < len(self._adapter.blocks) - 1
        purposes = [use for use in (wanted.fit, wanted.check) if use is not None]
        sums = [_Products(block, device, wanted.target_dense, use is wanted.check) for use in purposes]
        for rows in self._slices():
            scored = wanted.score is not None and wanted.score.covers(rows)
            fitted = any(use.covers(rows) for use in purposes)
            hat = self._prefix.inputs(block, rows) if fitted or (scored and not wanted.on_dense) else None
            aimed = fitted and wanted.target_dense
            dense = self._dense.inputs(block, rows, move=more) if aimed or (scored and wanted.on_dense) else None
            if scored:
                seen = dense if wanted.on_dense else hat
                weight = wanted.score.part(rows, device)  # (b, T)
                for name, x in seen.read.items():
                    omega = seen.weight(name, weight, wanted.score_relative)  # (b, T)
                    if norms:
                        norms.add(name, x, omega)
                    else:
                        size = x.shape[-1]
                        add_gram(grams.setdefault(name, torch.zeros(size, size, device=device)), x, omega)
            for use, total in zip(purposes, sums):
                if use.covers(rows):
                    total.add(hat, dense if wanted.target_dense else hat, use.part(rows, device), wanted.fit_relative)
        score = norms.norms if norms else {name: mirror(gram) for name, gram in grams.items()}
        if not sums:
            return BlockStatistics(score, {}, {}, {})
        return BlockStatistics(score, *(total.finish() for total in sums), sums[-1].power)

    @torch.inference_mode()
    def advance(self, block: BlockView) -> None:
        """Move the prefix stream on through a block, with the weights it has now; behind the last nobody reads it."""
        if self._prefix and block.index < len(self._adapter.blocks) - 1:
            for rows in self._slices():
                self._prefix.move(block, rows)


class _Stream:
    """Hidden states of the sequences from `first` on."""

    def __init__(self, adapter: Adapter, ids: torch.Tensor, first: int, batch: int, budget: int):
        self._first = first
        self._states = HiddenStates(adapter, ids[first:], batch, budget)

    @classmethod
    def of(cls, adapter: Adapter, ids: torch.Tensor, starts: list[int], batch: int, budget: int) -> "_Stream | None":
        """A stream of all sequences from the first of `starts` on; None where there are none."""
        return cls(adapter, ids, min(starts), batch, budget) if starts else None

    def _own(self, rows: slice) -> slice | None:
        return slice(rows.start - self._first, rows.stop - self._first) if rows.start >= self._first else None

    def inputs(self, block: BlockView, rows: slice, move: bool = False) -> Inputs:
        """What the block's linears read; with `move` the stream is the block's output afterwards."""
        own = self._own(rows)
        states = self._states.read(own)  # (b, T, C); on CPU the store itself, which a move writes to
        found = block_inputs(block, states.clone() if move else states, self._states.rotary)
        if move:
            self._states.write(own, found.stream["activated"] + block["down"](found.read["activated"]))
        return found

    def move(self, block: BlockView, rows: slice) -> None:
        own = self._own(rows)
        if own is not None:
            self._states.write(own, block.module(self._states.read(own), self._states.rotary))
