"""Whether evaluated text was calibrated or trained on: runs of tokens that occur in both.

Shapes: N windows of T tokens, n tokens in a run, U hashes.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

RUN = 24  # consecutive tokens that two texts do not share by chance
SPAN = 8  # consecutive runs of a training's text of which one is kept
MULTIPLIER = np.uint64(6364136223846793005)  # of a polynomial hash modulo 2^64 (Knuth's MMIX)


class KnownText:
    """Hashes of the token runs of a text that a model has seen.

    Args:
        runs: (U,) uint64, sorted and different.
    """

    def __init__(self, runs: np.ndarray):
        self._known = runs

    def shares(self, token_ids: Sequence[int] | torch.Tensor) -> bool:
        """Whether a text has RUN consecutive tokens of which a hash is known."""
        runs = _runs(np.asarray(token_ids))  # (T - RUN + 1,)
        places = np.searchsorted(self._known, runs).clip(max=max(0, len(self._known) - 1))
        return bool(len(self._known) and (self._known[places] == runs).any())

    def share(self, texts: Iterable[Sequence[int] | torch.Tensor]) -> float:
        """The share of texts with such a run."""
        flags = [self.shares(text) for text in texts]
        return sum(flags) / max(1, len(flags))


class CalibratedOn(KnownText):
    """All token runs of a calibration set.

    Args:
        windows: (N, T) integers, clean ids.
    """

    def __init__(self, windows: torch.Tensor):
        runs = [_runs(row) for row in windows.numpy()]
        super().__init__(np.unique(np.concatenate(runs)) if runs else np.zeros(0, np.uint64))


def marks(windows: torch.Tensor, learnt: torch.Tensor | None = None) -> np.ndarray:
    """A choice of the token runs of a training's text, about 2 of 9, by which a passage is found in another text
    (winnowing, Schleimer et al. 2003): always one of at least RUN + SPAN - 1 tokens, often a shorter one.

    Args:
        windows: (N, T) integers, clean ids. learnt: (N, T) bool, tokens that were learnt; None: all.
    Returns:
        (U,) uint64, sorted and different.
    """
    chosen = [np.zeros(0, np.uint64)]
    for runs in learnt_runs(windows, learnt, RUN):
        if len(runs) > SPAN:
            runs = np.lib.stride_tricks.sliding_window_view(runs, SPAN).min(-1)  # (T - RUN - SPAN + 2,)
        chosen.append(np.unique(runs))
    return np.unique(np.concatenate(chosen))


def learnt_runs(windows: torch.Tensor, learnt: torch.Tensor | None, length: int) -> Iterator[np.ndarray]:
    """Hashes of every window's runs of learnt tokens only: a chat template's own words are in every conversation.

    Args:
        windows, learnt: as for `marks`. length: n.
    """
    for index, row in enumerate(windows.numpy()):
        runs = _runs(row, length)  # (T - n + 1,)
        if learnt is not None and len(runs):
            fits = np.lib.stride_tricks.sliding_window_view(learnt[index].numpy(), length).all(-1)  # (T - n + 1,)
            filling = np.lib.stride_tricks.sliding_window_view(row[1:] == row[:-1], length - 1).all(-1)  # of an answer
            runs = runs[fits & ~filling]
        yield runs


def _runs(token_ids: np.ndarray, length: int = RUN) -> np.ndarray:
    """Hashes of all runs of n tokens: (T,) -> (T - n + 1,) uint64, empty for shorter texts."""
    count = len(token_ids) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    ids, total = token_ids.astype(np.uint64) + np.uint64(1), np.zeros(count, np.uint64)  # (T,), (count,)
    for offset in range(length):
        total = total * MULTIPLIER + ids[offset : offset + count]  # modulo 2^64
    return total
