"""SDAR's sampler (arXiv 2510.06303): blocks from left to right, counted from the first token of the prompt.

Shapes as in `sampling`: B rows, G generated positions, M predicted positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from structprune.generation.checks import check_not_negative, check_one_of, check_share, check_whole
from structprune.generation.sampler import Generation
from structprune.models import sampling_structprune as sampling

Order = Literal["low_confidence", "sequential"]


@dataclass(frozen=True)
class AlignedGeneration(Generation):
    """A block diffusion model's sampler; by default one token a step, the likeliest.

    The published default is a temperature of 1 and a threshold of 0.85. The tokens of a prompt behind its last whole
    block are the first ones of the first block; the last block is generated whole, and cut to `gen_length`. Every
    block has its share of the steps, `steps · block_length / gen_length` rounded up.
    """

    block_length: int = 4
    """Tokens of a block; the model's own by default, and no other."""
    temperature: float = 0.0
    """Divides the logits before tokens are drawn; 0 takes the likeliest."""
    top_k: int | None = None
    """Keep only so many likeliest tokens, for the choice and for confidence."""
    top_p: float | None = None
    """Keep only the likeliest tokens that make up this probability, after top_k."""
    remasking: Order = "low_confidence"
    """Which predictions are kept: the likeliest ones, or the first ones from the left (sequential)."""
    stop_at_eos: bool = False
    """Generate no further block of a row once a finished one holds an EOS: the rest becomes EOS. Published: off."""

    single_block = "blocks see no later one"
    by_confidence = {"remasking": "low_confidence"}
    of_config = {"block_length": "block_size"}
    sealed = aligned = True

    def __post_init__(self):
        super().__post_init__()
        check_whole(block_length=self.block_length)
        check_not_negative(temperature=self.temperature)
        check_one_of("remasking", self.remasking, get_args(Order))
        if self.top_k is not None:
            check_whole(top_k=self.top_k)
        if self.top_p is not None:
            check_share(top_p=self.top_p)

    @property
    def no_probability(self) -> str | None:
        return "remasking = sequential" if self.remasking == "sequential" else None

    @property
    def blocks(self) -> int:
        return -(-self.gen_length // self.block_length)

    @property
    def block_tokens(self) -> int:
        return self.block_length

    @property
    def steps_of_block(self) -> int:
        """A block's share of the steps of `gen_length` tokens, rounded up."""
        return -(-self.steps * self.block_length // self.gen_length)

    @property
    def draw_temperature(self) -> float:
        """1, because `shape_logits` divides by the temperature."""
        return 1.0 if self.temperature else 0.0

    @property
    def blind(self) -> bool:
        return False

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
