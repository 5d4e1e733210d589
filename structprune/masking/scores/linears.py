"""What a mask score gets and returns: the linears that read one input, and their masks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from structprune.config import MaskingSettings
from structprune.masking.patterns import group_mask, row_mask

Masked = tuple[torch.Tensor, torch.Tensor]  # weight (O, C) fp32, and mask (O, C) bool, true where a weight stays


@dataclass(frozen=True)
class Removal:
    """What is removed from a matrix: a share of its weights, or N of every M inputs of an output."""

    ratio: float
    nm: tuple[int, int] | None = None


@dataclass
class Linears:
    """Linears of a block that read the same input."""

    weights: list[torch.Tensor]  # (O_i, C) fp32 each
    removal: Removal
    statistic: torch.Tensor | None = None  # norms (C,) or Gram matrix (C, C) of the input; None for weights alone

    def take_statistic(self) -> torch.Tensor:
        """The statistic, no longer referenced here, so that its memory can be freed as soon as it is used."""
        statistic, self.statistic = self.statistic, None
        assert statistic is not None, "the score needs a statistic"
        return statistic


@dataclass(frozen=True)
class Outcome:
    """New weights and masks, in the order of the linears; for SparseGPT, how the Gram matrix was factored."""

    masked: list[Masked]
    damping: float | None = None  # more than configured where the factorisation needed it
    dead: int = 0  # inputs that were always 0


MaskFunction = Callable[[Linears, MaskingSettings], Outcome]


@dataclass(frozen=True)
class ByScores:
    """A mask function from scores of single weights: the lowest are removed.

    Attributes:
        scores: `scores(weight, statistic)` -> (O, C).
        mask: for a ratio, `mask(scores, ratio)` -> (O, C) bool; default per output row.
    """

    scores: Callable[[torch.Tensor, Any], torch.Tensor]
    mask: Callable[[torch.Tensor, float], torch.Tensor] = row_mask

    def __call__(self, linears: Linears, settings: MaskingSettings) -> Outcome:
        masked, removal = [], linears.removal
        for weight in linears.weights:
            scores = self.scores(weight, linears.statistic)  # (O, C)
            keep = group_mask(scores, *removal.nm) if removal.nm else self.mask(scores, removal.ratio)  # (O, C)
            masked.append((weight * keep, keep))
        return Outcome(masked)
