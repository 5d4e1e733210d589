"""LLaDA's sampler: blocks from left to right, remasking within a block (arXiv 2502.09992; docs/methods.md section 6).

Shapes as in `sampling`: B rows, G generated positions, M predicted positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from structprune.errors import UserError
from structprune.generation import sampling
from structprune.generation.sampler import Generation, check_not_negative, check_one_of, check_whole, present

Remasking = Literal["low_confidence", "random"]


@dataclass(frozen=True)
class LLaDAGeneration(Generation):
    """LLaDA's block-wise (semi-autoregressive) sampler with remasking; defaults as published, one token a step.

    Raises:
        UserError: a value that cannot be used, or an option that would change nothing.
    """

    gen_length: int = 128
    """Tokens generated after the prompt."""
    steps: int = 128
    """Denoising steps in all; the blocks share them equally."""
    block_length: int = 128
    """Tokens of a block; blocks are finished from left to right."""
    temperature: float = 0.0
    """Temperature of the Gumbel-max choice of tokens; 0 takes the likeliest."""
    cfg_scale: float = 0.0
    """w of classifier-free guidance, u + (1 + w)(c - u); the prompt is masked in u. Doubles the cost; 0 is off."""
    remasking: Remasking = "low_confidence"
    """Which predictions are kept: the likeliest ones after guidance, or those at random positions."""
    stop_at_eos: bool = False
    """Generate no further block of a row once a finished one holds an EOS: the rest becomes EOS. Published: off."""

    single_block = "block_length leaves only one block"
    by_confidence = {"remasking": "low_confidence"}

    def __post_init__(self):
        check_whole(gen_length=self.gen_length, steps=self.steps, block_length=self.block_length)
        check_not_negative(temperature=self.temperature, cfg_scale=self.cfg_scale)
        check_one_of("remasking", self.remasking, get_args(Remasking))
        if self.gen_length % self.block_length:
            raise UserError(
                f"gen_length = {self.gen_length} is not a multiple of block_length = {self.block_length}: change either"
            )
        if self.steps % self.blocks:
            remedy = f"give {self.blocks} or a multiple of it"
            raise UserError(f"steps = {self.steps} cannot be shared by {self.blocks} blocks: {remedy}")
        if self.stop_at_eos and self.blocks == 1:
            raise UserError(
                f"stop_at_eos stops between blocks, but block_length = {self.block_length} leaves only one: lower it"
            )

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def draw_temperature(self) -> float:
        return self.temperature

    @property
    def blind(self) -> bool:
        return self.remasking == "random"

    @property
    def draws_positions(self) -> bool:
        return self.blind

    def counts(self, step: int, began: torch.Tensor, remaining: torch.Tensor) -> torch.Tensor:
        steps = self.steps // self.blocks
        return sampling.reveal_counts(began, steps, step % steps)

    def shape_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def confidence(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return sampling.token_probability(logits, tokens)

    def scores(self, confidence: torch.Tensor | None, uniform: torch.Tensor | None) -> torch.Tensor:
        return present(uniform if self.blind else confidence)

    def reveal(self, step: int, scores: torch.Tensor, eligible: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return sampling.top_positions(scores, eligible, counts)
