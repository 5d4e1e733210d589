"""Whether evaluated text was calibrated on: runs of tokens that occur in both.

Shapes: N windows of T tokens, n tokens in a run.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

RUN = 24  # consecutive tokens that two texts do not share by chance
MULTIPLIER = np.uint64(6364136223846793005)  # of a polynomial hash modulo 2^64 (Knuth's MMIX)


class CalibratedOn:
    """The token runs of a calibration set.

    Args:
        windows: (N, T) integers, clean ids.
    """

    def __init__(self, windows: torch.Tensor):
        runs = [_runs(row) for row in windows.numpy()]
        self._known = np.unique(np.concatenate(runs)) if runs else np.zeros(0, np.uint64)  # (U,)

    def shares(self, token_ids: Sequence[int] | torch.Tensor) -> bool:
        """Whether a text has RUN consecutive tokens that were calibrated on."""
        runs = _runs(np.asarray(token_ids))  # (T - RUN + 1,)
        places = np.searchsorted(self._known, runs).clip(max=max(0, len(self._known) - 1))
        return bool(len(self._known) and (self._known[places] == runs).any())

    def share(self, texts: Iterable[Sequence[int] | torch.Tensor]) -> float:
        """The share of texts with such a run."""
        flags = [self.shares(text) for text in texts]
        return sum(flags) / max(1, len(flags))


def _runs(token_ids: np.ndarray) -> np.ndarray:
    """Hashes of all runs of RUN tokens: (T,) -> (T - RUN + 1,) uint64, empty for shorter texts."""
    count = len(token_ids) - RUN + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    ids, total = token_ids.astype(np.uint64) + np.uint64(1), np.zeros(count, np.uint64)  # (T,), (count,)
    for offset in range(RUN):
        total = total * MULTIPLIER + ids[offset : offset + count]  # modulo 2^64
    return total
