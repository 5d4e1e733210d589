"""Noisy windows in the order of training: item i is the same in every process, and after every restart.

Shapes: N windows, T tokens.
"""

from functools import lru_cache

import torch
from torch.utils.data import Dataset

from structprune.evaluation.perturb import item_generator, spread
from structprune.models.noising import mask_rate


class NoisyWindows(Dataset):
    """Items of an endless row of windows with noise; windows come in a new order in every epoch.

    Mask probabilities of items that follow each other fill (0, 1) evenly, so that every batch sees all noise levels.

    Args:
        windows: (N, T) int64 clean ids.
        learnt: (N, T) bool, tokens that may be masked; None: all.
        numbers: of the items in that row.
        mask_id: of the mask token.
        seed: of order, noise levels and masks.
        edges_visible: never mask the first and last token (Dream).
    """

    def __init__(
        self, windows: torch.Tensor, learnt: torch.Tensor | None, numbers: range, mask_id: int, *, seed: int,
        edges_visible: bool = False,
    ):  # fmt: skip
        self._windows, self._learnt, self._mask_id, self._seed = windows, learnt, mask_id, seed
        self._edges_visible, self._numbers = edges_visible, numbers
        levels = spread(numbers.stop, 1, item_generator(seed, "levels"))  # (end of numbers,)
        self._rates = mask_rate(levels[numbers.start :])  # (count,)

    def __len__(self) -> int:
        return len(self._rates)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids` (T,) clean, `noisy_ids` (T,), the mask `rate` (), the item's `index` (), and `learnt` (T,) where
        not all tokens are."""
        number = self._numbers[index]
        epoch, place = divmod(number, len(self._windows))
        window = int(_order(self._seed, epoch, len(self._windows))[place])
        ids, rate = self._windows[window], self._rates[index]  # (T,), ()
        masked = torch.rand(len(ids), generator=item_generator(self._seed, f"noise {number}")) < rate  # (T,)
        if self._learnt is not None:
            masked &= self._learnt[window]
        if self._edges_visible:
            masked[0] = masked[-1] = False
        noisy = ids.masked_fill(masked, self._mask_id)  # (T,)
        item = {"input_ids": ids, "noisy_ids": noisy, "rate": rate, "index": torch.tensor(index)}
        return item if self._learnt is None else item | {"learnt": self._learnt[window]}


def windows_of(numbers: range, windows: int, seed: int) -> torch.Tensor:
    """Which of N windows the items with these numbers are made of, (n,) int64, ascending."""
    places = [divmod(end, windows) for end in (numbers.start, numbers.stop)]
    (first, start), (last, stop) = places
    if last - first > 1:  # a whole epoch lies between
        return torch.arange(windows)
    orders = [_order(seed, epoch, windows) for epoch in range(first, last + 1)]
    parts = [orders[0][start:stop]] if first == last else [orders[0][start:], orders[1][:stop]]
    return torch.cat(parts).unique()


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, windows: int) -> torch.Tensor:
    """The windows of an epoch, (N,) int64."""
    return torch.randperm(windows, generator=item_generator(seed, f"epoch {epoch}"))
