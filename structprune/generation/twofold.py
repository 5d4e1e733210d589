"""The sampler of models that are causal too (Nemotron-Labs-Diffusion): blocks from left to right behind the prompt.

Shapes as in `sampling`: B rows, G generated positions, M predicted positions, V vocabulary.
"""

from dataclasses import dataclass

import torch

from structprune.generation.checks import check_not_negative, check_whole
from structprune.generation.sampler import Generation
from structprune.models import sampling_structprune as sampling


@dataclass(frozen=True)
class TwofoldGeneration(Generation):
    """A sampler whose blocks begin with a token predicted causally, as what is finished is read; others by confidence.

    By default one token a step, as published. The last block is generated whole, and cut to `gen_length`. Every block
    has its share of the steps, `steps · block_length / gen_length` rounded up.
    """

    block_length: int = 32
    """Tokens of a block; the model's own by default, and no other."""
    temperature: float = 0.0
    """Temperature of the Gumbel-max choice of tokens; 0 takes the likeliest. Confidence does not depend on it."""
    stop_at_eos: bool = False
    """Generate no further block of a row once a finished one holds an EOS: the rest becomes EOS. Published: on."""

    single_block = "blocks see no later one"
    by_confidence = {}
    of_config = {"block_length": "block_size"}
    sealed = begins = True

    def __post_init__(self):
        super().__post_init__()
        check_whole(block_length=self.block_length)
        check_not_negative(temperature=self.temperature)

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
        return self.temperature

    @property
    def blind(self) -> bool:
        return False

    def counts(self, step: int, began: torch.Tensor, remaining: torch.Tensor) -> torch.Tensor:
        """Shares of the masks behind a block's first token."""
        return sampling.reveal_counts(began, self.steps_of_block, step % self.steps_of_block)
