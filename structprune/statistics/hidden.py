"""Hidden states of all calibration sequences, advanced block by block: in memory, or in a file beyond the budget."""

import math
from collections.abc import Iterator

import torch

from structprune.models.adapter import Adapter
from structprune.models.maps import file_tensor, give_back
from structprune.models.transfer import StagedRows, lane_to, send

REMEDY = "raise memory.budget_gb, or lower calibration.windows"  # of a pruning run


def empty_on_host(shape: tuple[int, ...], dtype: torch.dtype, budget: int, remedy: str = REMEDY) -> torch.Tensor:
    """An empty host tensor: in memory within `budget` bytes, else in a temporary file (`file_tensor`).

    Args:
        remedy: what the user can do where it does not fit, beside another TMPDIR.
    Raises:
        UserError: the temporary directory is too full.
    """
    if math.prod(shape) * dtype.itemsize <= budget:
        return torch.empty(shape, dtype=dtype)
    return file_tensor(shape, dtype, remedy)


class HiddenStates:
    """The residual stream (R, S, C) of R rows of a pass before some block, at first the embeddings.

    Beyond `budget` bytes it lives in a memory-mapped temporary file.

    Args:
        overlap: on an accelerator, copy rows while others are computed (`StagedRows`).
        remedy: see `empty_on_host`.
    """

    def __init__(
        self, adapter: Adapter, ids: torch.Tensor, batch: int, budget: int, overlap: bool = False, remedy: str = REMEDY
    ):
        self._adapter, self._batch = adapter, batch
        shape = (*ids.shape, adapter.hidden_size)
        self._states = empty_on_host(shape, adapter.dtype, budget, remedy)  # (R, T, C)
        lane = lane_to(adapter.device) if overlap else None
        self._staged = None if lane is None else StagedRows(self._states, lane, batch)
        self._used: slice | None = None  # rows, the last ones
        self.context = adapter.context(ids.shape)
        for rows in self.slices():
            self.write(rows, adapter.model.embedding(send(ids[rows], adapter.device)))

    def slices(self) -> Iterator[slice]:
        """The batches' row slices."""
        for start in range(0, len(self._states), self._batch):
            yield slice(start, start + self._batch)

    def _give_back_before(self, rows: slice) -> None:
        """Before some rows are used: give back a file's pages of those before, which would stay in memory else."""
        if self._used is not None and self._used != rows:
            give_back(self._states[self._used])
        self._used = rows

    def read(self, rows: slice) -> torch.Tensor:
        """Hidden states of some sequences on the model's device, (b, T, C)."""
        self._give_back_before(rows)
        if self._staged is not None:
            return self._staged.read(rows)
        return self._states[rows].to(self._adapter.device)

    def write(self, rows: slice, states: torch.Tensor) -> None:
        """Replace the hidden states of some sequences by (b, T, C), which must not change afterwards."""
        self._give_back_before(rows)
        if self._staged is not None:
            self._staged.write(rows, states)
        else:
            self._states[rows] = states.to(self._states.device)
