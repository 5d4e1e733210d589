"""Dream's sampler: shares of the masks between times from 1 to eps (arXiv 2508.15487; docs/methods.md section 6).

Shapes as in `sampling`: B rows, G generated positions, M predicted positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from structprune.errors import UserError
from structprune.generation import sampling
from structprune.generation.sampler import Generation, check_not_negative, check_one_of, check_whole, present

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]


@dataclass(frozen=True)
class DreamGeneration(Generation):
    """Dream's sampler: times from 1 to eps, no blocks, no guidance.

    Raises:
        UserError: a value that cannot be used, or an option that would change nothing.
    """

    gen_length: int = 128
    """Tokens generated after the prompt (Dream's max_new_tokens)."""
    steps: int = 128
    """Denoising steps."""
    alg: Algorithm = "entropy"
    """Which masks are revealed first: the surest by top probability (maskgit_plus), by first minus second (topk_margin)
    or by negative entropy; origin: each independently with probability 1 - s/t."""
    temperature: float = 0.0
    """Divides the logits before tokens are drawn; 0 takes the likeliest."""
    top_p: float | None = None
    """Keep only the likeliest tokens that make up this probability, for the choice and for confidence."""
    top_k: int | None = None
    """Keep only so many likeliest tokens, after top_p."""
    alg_temp: float | None = None
    """Positions are drawn from softmax(confidence / alg_temp) without replacement; None or 0 takes the surest."""
    eps: float = 1e-3
    """The last time."""

    single_block = "Dream's sampler has no blocks"
    by_confidence = {"alg": "maskgit_plus"}

    def __post_init__(self):
        check_whole(gen_length=self.gen_length, steps=self.steps)
        check_not_negative(temperature=self.temperature, alg_temp=self.alg_temp or 0, eps=self.eps)
        check_one_of("alg", self.alg, get_args(Algorithm))
        if not self.eps < 1:
            raise UserError(f"eps = {self.eps} is not below 1, where time starts: give a number such as 0.001")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} is not a probability: give a number above 0, up to 1, or drop it")
        if self.top_k is not None:
            check_whole(top_k=self.top_k)
        if self.alg == "origin" and self.alg_temp:
            raise UserError(
                f"alg_temp = {self.alg_temp} has no effect with alg = origin, which has no confidence: drop it"
            )
        if self.alg == "origin" and not self.temperature and (self.top_p or self.top_k):
            raise UserError("top_p and top_k have no effect with alg = origin at temperature 0: drop them")

    @property
    def blocks(self) -> int:
        return 1

    @property
    def draw_temperature(self) -> float:
        """1, because `shape_logits` divides by the temperature."""
        return 1.0 if self.temperature else 0.0

    @property
    def blind(self) -> bool:
        return self.alg == "origin"

    @property
    def draws_positions(self) -> bool:
        return self.blind or bool(self.alg_temp)

    def counts(self, step: int, began: torch.Tensor, remaining: torch.Tensor) -> torch.Tensor:
        return remaining if self.blind else sampling.shared_counts(remaining, self._share(step))

    def shape_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Temperature, then top-p, then top-k: (M, V) -> (M, V)."""
        if self.temperature:
            logits = logits / self.temperature  # (M, V)
        if self.top_p is not None and self.top_p < 1:
            logits = sampling.top_p_filter(logits, self.top_p)  # (M, V)
        return logits if self.top_k is None else sampling.top_k_filter(logits, self.top_k)

    def confidence(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if self.alg == "entropy":
            return sampling.negative_entropy(logits)
        return sampling.top_margin(logits) if self.alg == "topk_margin" else sampling.token_probability(logits, tokens)

    def scores(self, confidence: torch.Tensor | None, uniform: torch.Tensor | None) -> torch.Tensor:
        """With alg_temp the highest k are k draws from softmax(confidence / alg_temp) without replacement."""
        if self.alg_temp:
            return present(confidence).double() / self.alg_temp + sampling.gumbel(present(uniform))  # (B, G)
        return present(uniform if self.blind else confidence)

    def reveal(self, step: int, scores: torch.Tensor, eligible: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if self.blind:
            return eligible & (scores < self._share(step).to(scores.device))
        return sampling.top_positions(scores, eligible, counts)

    def _share(self, step: int) -> torch.Tensor:
        return sampling.reveal_shares(self.steps, self.eps)[step]
