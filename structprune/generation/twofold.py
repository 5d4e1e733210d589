"""The sampler of models that are causal too (Nemotron-Labs-Diffusion): blocks from left to right behind the prompt.

Shapes as in `sampling`: B rows, G generated positions, M predicted positions, V vocabulary.
"""

from dataclasses import dataclass

import torch

from structprune.generation.blockwise import BlockGeneration
from structprune.models import sampling_structprune as sampling


@dataclass(frozen=True)
class TwofoldGeneration(BlockGeneration):
    """A sampler whose blocks begin with a token predicted causally, as what is finished is read; others by confidence.

    By default one token a step, as published; published, a row also ends at its EOS. `temperature` is of the Gumbel-max
    choice, and confidence does not depend on it.
    """

    by_confidence = {}
    begins = True

    @property
    def draw_temperature(self) -> float:
        return self.temperature

    def counts(self, step: int, began: torch.Tensor, remaining: torch.Tensor) -> torch.Tensor:
        """Shares of the masks behind a block's first token."""
        return sampling.reveal_counts(began, self.steps_of_block, step % self.steps_of_block)
