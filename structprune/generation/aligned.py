"""SDAR's sampler (arXiv 2510.06303): blocks from left to right, counted from the first token of the prompt.

Shapes as in `sampling`: B rows, G generated positions, M predicted positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from structprune.generation.blockwise import BlockGeneration
from structprune.generation.checks import check_one_of, check_share, check_whole
from structprune.models import sampling_structprune as sampling

Order = Literal["low_confidence", "sequential"]


@dataclass(frozen=True)
class AlignedGeneration(BlockGeneration):
    """A block diffusion model's sampler; by default one token a step, the likeliest.

    The published default is a temperature of 1, which divides the logits, and a threshold of 0.85; rows do not end at
    an EOS. The tokens of a prompt behind its last whole block are the first ones of the first block.
    """

    top_k: int | None = None
    """Keep only so many likeliest tokens, for the choice and for confidence."""
    top_p: float | None = None
    """Keep only the likeliest tokens that make up this probability, after top_k."""
    remasking: Order = "low_confidence"
    """Which predictions are kept: the likeliest ones, or the first ones from the left (sequential)."""

    by_confidence = {"remasking": "low_confidence"}
    aligned = True

    def __post_init__(self):
        super().__post_init__()
        check_one_of("remasking", self.remasking, get_args(Order))
        if self.top_k is not None:
            check_whole(top_k=self.top_k)
        if self.top_p is not None:
            check_share(top_p=self.top_p)

    @property
    def no_probability(self) -> str | None:
        return "remasking = sequential" if self.remasking == "sequential" else None

    @property
    def draw_temperature(self) -> float:
        """1, because `shape_logits` divides by the temperature."""
        return 1.0 if self.temperature else 0.0

    def counts(self, step: int, began: torch.Tensor, remaining: torch.Tensor) -> torch.Tensor:
        """As many as of a block of masks, also where a prompt fills a part of the block."""
        steps = self.steps_of_block
        return sampling.reveal_counts(torch.full_like(began, self.block_length), steps, step % steps)

    def shape_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Temperature, then top-k, then top-p: (M, V) -> (M, V)."""
        if self.temperature:
            logits = logits / self.temperature  # (M, V)
        if self.top_k is not None:
            logits = sampling.top_k_filter(logits, self.top_k)  # (M, V)
        return sampling.top_p_filter(logits, self.top_p) if self.top_p is not None and self.top_p < 1 else logits

    def scores(self, confidence: torch.Tensor | None, uniform: torch.Tensor | None) -> torch.Tensor:
        scores = super().scores(confidence, uniform)  # (B, G)
        return torch.zeros_like(scores) if self.remasking == "sequential" else scores  # the earlier of equal ones first
