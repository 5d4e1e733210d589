"""Hidden states of all calibration sequences, advanced block by block: in memory, or in a file beyond the budget."""

import tempfile
from typing import Iterator

import torch

from structprune.models.adapter import Adapter


class HiddenStates:
    """The residual stream (R, T, C) of R sequences before some block.

    It starts as the embeddings; `advance` moves it over one block. What does not fit `budget` bytes lives in a
    memory-mapped temporary file, which the system removes with the object.
    """

    def __init__(self, adapter: Adapter, ids: torch.Tensor, batch: int, budget: int):
        self._adapter, self._batch = adapter, batch
        weight = adapter.model.embedding.weight
        shape = (*ids.shape, adapter.hidden_size)  # (R, T, C)
        self._file = None
        if ids.numel() * adapter.hidden_size * weight.element_size() <= budget:
            self._states = torch.empty(shape, dtype=weight.dtype)
        else:
            self._file = tempfile.NamedTemporaryFile(prefix="structprune-")
            count = ids.numel() * adapter.hidden_size
            flat = torch.from_file(self._file.name, shared=True, size=count, dtype=weight.dtype)
            self._states = flat.view(shape)
        self.rotary = adapter.model.rotary(ids.shape[1], adapter.device)
        for rows in self.slices():
            self._states[rows] = adapter.model.embedding(ids[rows].to(adapter.device)).cpu()

    def slices(self) -> Iterator[slice]:
        """The batches' row slices."""
        for start in range(0, len(self._states), self._batch):
            yield slice(start, start + self._batch)

    def read(self, rows: slice) -> torch.Tensor:
        """Hidden states of some sequences on the model's device, (b, T, C)."""
        return self._states[rows].to(self._adapter.device)

    def write(self, rows: slice, states: torch.Tensor) -> None:
        """Replace the hidden states of some sequences by (b, T, C)."""
        self._states[rows] = states.to(self._states.device)
