"""What every sampler of `generate` is: settings, and parts in a denoising step (docs/methods.md section 6).

Shapes: B rows, G generated positions, M predicted positions, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from structprune.errors import UserError
from structprune.generation.checks import check_share, check_whole
from structprune.models import sampling_structprune as sampling


@dataclass(frozen=True)
class Generation(ABC):
    """A sampler's settings, and its part in a denoising step; by default one block without guidance.

    Raises:
        UserError: a value that cannot be used, or an option that would change nothing.
    """

    gen_length: int = 128
    """Tokens generated after the prompt (Dream's max_new_tokens)."""
    steps: int = 128
    """Denoising steps in all; blocks share them equally."""
    threshold: float | None = field(default=None, kw_only=True)
    """Also reveal every prediction whose confidence is at least this, and one at least: fewer steps (Fast-dLLM, arXiv
    2505.22618). The confidence is a probability, or topk_margin's difference of two."""

    single_block: ClassVar[str]  # why there is only one block, where there is
    by_confidence: ClassVar[Mapping[str, Any]]  # options by which the most confident predictions are revealed first
    of_config: ClassVar[Mapping[str, str]] = {}  # options that a model decides -> the key of its config
    sealed: ClassVar[bool] = False  # whether blocks see none behind them
    aligned: ClassVar[bool] = False  # whether blocks count from the first token
    begins: ClassVar[bool] = False  # whether a block begins with a token that is predicted causally

    def __post_init__(self):
        check_whole(gen_length=self.gen_length, steps=self.steps)
        if self.threshold is not None:
            check_share(threshold=self.threshold)
            if other := self.no_probability:
                raise UserError(f"threshold = {self.threshold} needs a probability, which {other} lacks: drop it")

    @property
    def no_probability(self) -> str | None:
        """The option and value, such as alg = origin, with which predictions have no probability to compare."""
        return None

    @property
    def blocks(self) -> int:
        """Parts of the generated text that are finished one after the other."""
        return 1

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.gen_length // self.blocks

    @property
    def steps_of_block(self) -> int:
        return self.steps // self.blocks

    def started(self, prompt: int) -> int:
        """Tokens of a prompt of that length that the first block begins with."""
        return prompt % self.block_tokens if self.aligned else 0

    def span(self, started: int) -> int:
        """Tokens of all blocks that generation runs through, where the first begins with `started` of a prompt."""
        return -(-(started + self.gen_length) // self.block_tokens) * self.block_tokens

    def reach(self, prompt: int) -> int:
        """Positions that a prompt of that length and all blocks behind it take."""
        started = self.started(prompt)
        return prompt - started + self.span(started)

    def step_count(self, prompts: Sequence[int]) -> int:
        """Denoising steps of a batch of prompts of these lengths."""
        return self.span(max(map(self.started, prompts))) // self.block_tokens * self.steps_of_block

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
        """Whether positions are chosen at random, without the predictions: only the chosen positions are predicted."""

    @property
    def draws_positions(self) -> bool:
        """Whether the revealed positions are random."""
        return self.blind

    @property
    def draws(self) -> bool:
        """Whether anything is random."""
        return self.draws_positions or self.draw_temperature > 0

    @abstractmethod
    def counts(self, step: int, began: torch.Tensor, remaining: torch.Tensor) -> torch.Tensor:
        """Masks to reveal at a step, (B,), from the block's masks when it `began` and those `remaining`, (B,) each."""

    def shape_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits that tokens are chosen from and confidence is computed on: (M, V) -> (M, V)."""
        return logits

    def confidence(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """How sure the prediction of `tokens` is, higher is surer: (M, V), (M,) -> (M,)."""
        return sampling.token_probability(logits, tokens)

    def scores(self, confidence: torch.Tensor | None, uniform: torch.Tensor | None) -> torch.Tensor:
        """What positions are ranked by, (B, G).

        Args:
            confidence: (B, G), None where `blind`. uniform: (B, G) noise, None unless `draws_positions`.
        """
        scores = uniform if self.blind else confidence
        assert scores is not None
        return scores

    def reveal(self, step: int, scores: torch.Tensor, eligible: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Positions to reveal at a step: (B, G) bool."""
        return sampling.top_positions(scores, eligible, counts)
