"""A model run consumer by consumer over many sequences, so that a refit can stand between reading and writing."""

import torch

from structprune.criteria.paths import CONSUMER
from structprune.models.adapter import Adapter
from structprune.statistics.hidden import HiddenStates

Key = tuple[int, str]  # (block index, kind of unit)


class ResidualRun:
    """What every consumer reads, in the order of the forward pass, over R sequences of T tokens.

    `read` gives a consumer's input for some sequences; `advance` adds its output to the residual stream, with the
    weights it has by then. What was read is held until `advance` where it fits the budget, else computed again. With
    `keep` all of it is held for good where that fits, so that the run can be read many times at the cost of one.
    """

    def __init__(self, adapter: Adapter, ids: torch.Tensor, batch: int, budget: int, keep: bool = False):
        self._adapter, self._ids, self._batch, self._budget = adapter, ids, batch, budget
        size = ids.numel() * adapter.model.embedding.weight.element_size()
        widths = [block[role].in_features for block in adapter.blocks for role in CONSUMER.values()]
        self._keep = keep and size * sum(widths) <= budget
        self._hold = size * max(widths) <= budget
        self._held: dict[Key, dict[int, torch.Tensor]] = {}
        self._done: set[Key] = set()
        self._states = HiddenStates(adapter, ids, batch, budget)

    def restart(self) -> None:
        """Go back to the first block; free where everything is held."""
        if not self._keep and self._done:
            self._done, self._held = set(), {}
            self._states = HiddenStates(self._adapter, self._ids, self._batch, self._budget)

    def slices(self):
        """The batches' row slices."""
        return self._states.slices()

    def compute(self, key: Key, states: torch.Tensor, channels: Adapter | None = None) -> torch.Tensor:
        """The consumer's input on given hidden states (b, T, C), by this run's model or another's block."""
        block = (channels or self._adapter).blocks[key[0]].module
        return block.mix(states, self._states.rotary) if key[1] == "attention" else block.activate(states)

    def states(self, rows: slice) -> torch.Tensor:
        """The residual stream that the current consumer's block reads, (b, T, C)."""
        return self._states.read(rows)

    def read(self, key: Key, rows: slice) -> torch.Tensor:
        """Input of consumer `key` for some sequences, (b, T, C)."""
        held = self._held.setdefault(key, {})
        if rows.start in held:
            return held[rows.start]
        value = self.compute(key, self._states.read(rows))  # (b, T, C)
        if self._keep or self._hold:
            held[rows.start] = value
        return value

    def advance(self, key: Key) -> None:
        """Add the consumer's output to the residual stream of all sequences."""
        if key in self._done:
            return
        consumer = self._adapter.blocks[key[0]][CONSUMER[key[1]]]
        for rows in self.slices():
            self._states.write(rows, self._states.read(rows) + consumer(self.read(key, rows)))
        self._done.add(key)
        if not self._keep:
            self._held.pop(key, None)
