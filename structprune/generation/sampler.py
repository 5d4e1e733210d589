"""What a sampler is: its settings, and its part in a denoising step of `generate` (docs/methods.md section 6).

Shapes as in `sampling`: B rows, G generated positions, M predicted positions, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from structprune.errors import UserError, nearest


class Generation(ABC):
    """A sampler's settings, and its part in a denoising step.

    Attributes:
        gen_length: tokens generated after the prompt. steps: denoising steps in all.
        single_block: why there is only one block, where there is.
        by_confidence: options under which the most confident predictions are revealed first.
    """

    gen_length: int
    steps: int
    single_block: ClassVar[str]
    by_confidence: ClassVar[Mapping[str, Any]]

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Parts of the generated text that are finished one after the other."""

    @property
    def cfg_scale(self) -> float:
        """Scale of classifier-free guidance; 0 is off."""
        return 0.0

    @property
    def stop_at_eos(self) -> bool:
        """Whether a row ends at an EOS."""
        return False

    @property
    @abstractmethod
    def draw_temperature(self) -> float:
        """Temperature of the choice among the logits that `shape_logits` returns."""

    @property
    @abstractmethod
    def blind(self) -> bool:
        """Whether positions are chosen without the predictions, so that only the chosen positions are predicted."""

    @property
    @abstractmethod
    def draws_positions(self) -> bool:
        """Whether the revealed positions are random."""

    @property
    def draws(self) -> bool:
        """Whether anything is random."""
        return self.draws_positions or self.draw_temperature > 0

    @abstractmethod
    def counts(self, step: int, began: torch.Tensor, remaining: torch.Tensor) -> torch.Tensor:
        """Masks to reveal at a step, (B,), from the block's masks when it `began` and those `remaining`, (B,) each."""

    @abstractmethod
    def shape_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits that tokens are chosen from and confidence is computed on: (M, V) -> (M, V)."""

    @abstractmethod
    def confidence(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """How sure the prediction of `tokens` is, higher is surer: (M, V), (M,) -> (M,)."""

    @abstractmethod
    def scores(self, confidence: torch.Tensor | None, uniform: torch.Tensor | None) -> torch.Tensor:
        """What positions are ranked by, (B, G).

        Args:
            confidence: (B, G), None where `blind`. uniform: (B, G) noise, None unless `draws_positions`.
        """

    @abstractmethod
    def reveal(self, step: int, scores: torch.Tensor, eligible: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Positions to reveal at a step: (B, G) bool."""


def check_whole(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} = {value!r} cannot be used: give a whole number from 1")


def check_not_negative(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise UserError(f"{name} = {value!r} cannot be used: give 0 (off) or more")


def check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"unknown {name} '{value}'{nearest(str(value), list(known))}: choose one of {', '.join(known)}")


def present(tensor: torch.Tensor | None) -> torch.Tensor:
    """The argument that `blind` and `draws_positions` say is there."""
    assert tensor is not None
    return tensor
