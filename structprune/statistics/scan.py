"""What goes through a model together: the model, the windows it reads, sink settings, limits, and who watches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.adapter import Adapter
from structprune.models.journal import NOWHERE, Journal
from structprune.models.layers_structprune import Layout
from structprune.progress import Track, untracked
from structprune.workers import ALONE, Workers

Observe = Callable[[torch.Tensor], None]  # receives the attention mass (..., T) that sink weights are computed from
PASS_TOKENS = 8192  # most tokens in a forward pass that does not need whole windows


def unobserved(mass: torch.Tensor) -> None:
    """The mass hook that does nothing."""


@dataclass(frozen=True)
class Limits:
    """How much is processed at once."""

    windows: int = 1  # per forward pass, each with all its noise levels
    budget: int = 2**33  # bytes that statistics and hidden states may hold in memory
    overlap: bool = False  # on an accelerator, copy hidden states while other rows are computed
    batch: int | None = None  # sequences in every forward pass; None derives them from `windows`

    def sequences(self, copies: int, length: int) -> int:
        """Sequences of `length` tokens per forward pass: all `copies` of `windows` windows, at most `PASS_TOKENS`.

        For work that takes sequences one by one. Scores that compare all levels of a window use `windows` directly.
        """
        if self.batch is not None:
            return self.batch
        return max(1, min(self.windows * copies, PASS_TOKENS // length))


@dataclass(frozen=True, eq=False)
class Scan:
    """The context of every measurement of a model.

    Of several processes each reads windows of its own, and what is measured are sums over all.
    """

    adapter: Adapter
    calibration: Calibration  # this process's windows
    sink: SinkSettings = SinkSettings()
    limits: Limits = Limits()
    track: Track = untracked
    observe: Observe = unobserved  # called for every pass that sink weights come from, in the order of the sequences
    journal: Journal = NOWHERE  # of attention mass that an earlier run measured
    workers: Workers = ALONE
    causal: float = 1.0  # weight of the rows' tokens that are read causally, where the layout has such

    def sequences(self, copies: int | None = None) -> int:
        """Sequences per forward pass, with `copies` of each window (default: all noise levels)."""
        copies = self.calibration.levels if copies is None else copies
        return self.limits.sequences(copies, self.calibration.length * self.layout.copies)

    @property
    def layout(self) -> Layout:
        """How the calibration's windows lie in the rows of a pass."""
        return self.adapter.model.layout
