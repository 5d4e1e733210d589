"""Hidden states of all calibration sequences, advanced block by block: in memory, or in a file beyond the budget."""

import math
import tempfile
from typing import Iterator

import torch

from structprune.models.adapter import Adapter


def roomy(shape: tuple[int, ...], dtype: torch.dtype, budget: int):
    """An empty host tensor, and None or, beyond `budget` bytes, the temporary file that it is mapped to.

    The system removes the file when it is let go of: keep it as long as the tensor.
    """
    count = math.prod(shape)
    if count * dtype.itemsize <= budget:
        return torch.empty(shape, dtype=dtype), None
    file = tempfile.NamedTemporaryFile(prefix="structprune-")
    return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape), file


class HiddenStates:
    """The residual stream (R, T, C) of R sequences before some block.

    It starts as the embeddings; `write` replaces it. What does not fit `budget` bytes lives in a memory-mapped
    temporary file.
    """

    def __init__(self, adapter: Adapter, ids: torch.Tensor, batch: int, budget: int):
        self._adapter, self._batch = adapter, batch
        weight = adapter.model.embedding.weight
        self._states, self._file = roomy((*ids.shape, adapter.hidden_size), weight.dtype, budget)  # (R, T, C)
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
