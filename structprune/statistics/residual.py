"""A model run consumer by consumer over many sequences, so that a refit can change each before its output counts."""

from collections.abc import Iterator

import torch
from torch import nn

from structprune.models.adapter import CONSUMER, Adapter, BlockView, UnitKey
from structprune.statistics.hidden import HiddenStates


class ResidualRun:
    """The inputs of every consumer, in the order of the forward pass, over R sequences of T tokens.

    `read` returns a consumer's input for some sequences; `advance` adds its output to the residual stream, with the
    weights it has by then. Inputs are held until `advance` where they fit the budget, else computed again.
    """

    def __init__(self, adapter: Adapter, ids: torch.Tensor, batch: int, budget: int, overlap: bool = False):
        self._adapter, self._ids, self._batch, self._budget = adapter, ids, batch, budget
        self._size = ids.numel() * adapter.dtype.itemsize  # bytes of one feature of all tokens
        widest = max(block[role].in_features for block in adapter.blocks for role in block.consumers)
        self._hold = self._size * widest <= budget
        self._held: dict[UnitKey, dict[int, torch.Tensor]] = {}
        self._overlap = overlap
        self._states = HiddenStates(adapter, ids, batch, budget, overlap)

    def slices(self) -> Iterator[slice]:
        """The batches' row slices."""
        return self._states.slices()

    def compute(self, kind: str, states: torch.Tensor, block: BlockView) -> torch.Tensor:
        """What a block's consumer reads on given hidden states (b, T, C); the block may be another model's."""
        return block.consumed(kind, states, self._states.context)

    def _compute(self, key: UnitKey, rows: slice) -> torch.Tensor:
        return self.compute(key[1], self.states(rows), self._adapter.blocks[key[0]])

    def states(self, rows: slice) -> torch.Tensor:
        """The residual stream that the current consumer's block reads, (b, T, C)."""
        return self._states.read(rows)

    def consumer(self, key: UnitKey) -> nn.Linear:
        """The linear that `key` names."""
        return self._adapter.blocks[key[0]][CONSUMER[key[1]]]

    def read(self, key: UnitKey, rows: slice) -> torch.Tensor:
        """Input of consumer `key` for some sequences, (b, T, C)."""
        return self._cached(key, rows, lambda: self._compute(key, rows))

    def output(self, key: UnitKey, rows: slice) -> torch.Tensor:
        """Output of consumer `key` for some sequences, with the weights it has now, (b, T, O)."""
        return self.consumer(key)(self.read(key, rows))

    def advance(self, key: UnitKey) -> None:
        """Add the consumer's output to the residual stream of all sequences."""
        for rows in self.slices():
            self._states.write(rows, self._states.read(rows) + self.output(key, rows))
        self._held.pop(key, None)

    def pass_mixture(self, index: int) -> None:
        """Add what the experts of a block give to the residual stream of all sequences."""
        mixture = self._adapter.blocks[index].mixture
        if mixture is None:  # all of it was cut
            return
        for rows in self.slices():
            self._states.write(rows, mixture.add_mlp(self._states.read(rows)))

    def _cached(self, key: UnitKey, rows: slice, compute) -> torch.Tensor:
        held = self._held.setdefault(key, {})
        if rows.start in held:
            return held[rows.start]
        value = compute()
        if self._hold:
            held[rows.start] = value
        return value


class TargetRun(ResidualRun):
    """The outputs of the dense model's consumers, which do not change: held for the whole run where all fit the budget.

    `restart` goes back to the first block; where everything is held, another walk only adds the outputs up.
    """

    def __init__(self, adapter: Adapter, ids: torch.Tensor, batch: int, budget: int, overlap: bool = False):
        super().__init__(adapter, ids, batch, budget, overlap)
        count = sum(len(block.kinds) for block in adapter.blocks)
        self.holds_all = self._size * count * adapter.hidden_size <= budget
        self._hold = self._size * adapter.hidden_size <= budget
        self._advanced = False

    def restart(self) -> None:
        """Start again from the embeddings, unless nothing was consumed yet."""
        if self._advanced:
            self._advanced = False
            if not self.holds_all:
                self._held = {}
            self._states = HiddenStates(self._adapter, self._ids, self._batch, self._budget, self._overlap)

    def read(self, key: UnitKey, rows: slice) -> torch.Tensor:
        return self._compute(key, rows)

    def output(self, key: UnitKey, rows: slice) -> torch.Tensor:
        return self._cached(key, rows, lambda: self.consumer(key)(self.read(key, rows)))

    def pass_mixture(self, index: int) -> None:
        super().pass_mixture(index)
        self._advanced = True

    def advance(self, key: UnitKey) -> None:
        held = self._held.get(key) if self.holds_all else None
        super().advance(key)
        if held is not None:
            self._held[key] = held
        self._advanced = True
