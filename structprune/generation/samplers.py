"""Settings of the families' samplers, and what in a denoising step differs between them (docs/methods.md section 6).

`generate` is the one code path; it asks a settings object how many masks go at a step, how logits are
shaped, how sure a prediction is, and which positions are revealed. Papers: LLaDA arXiv 2502.09992, Dream arXiv
2508.15487. Shapes as in `sampling`: B rows, G generated positions, M predicted positions, V vocabulary.
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Mapping, get_args

import torch

from structprune.errors import UserError, nearest
from structprune.generation import sampling
from structprune.models.families import family_of

Remasking = Literal["low_confidence", "random"]
Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]


def _whole(**values) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} = {value!r} is no count: give a whole number from 1")


def _not_negative(**values) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise UserError(f"{name} = {value!r} cannot be used: give 0 (off) or more")


def _one_of(name: str, value, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"unknown {name} '{value}'{nearest(str(value), list(known))}: choose one of {', '.join(known)}")


@dataclass(frozen=True)
class LLaDAGeneration:
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
    """Of the Gumbel-max choice of tokens; 0 takes the likeliest."""
    cfg_scale: float = 0.0
    """w of classifier-free guidance, u + (1 + w)(c - u); the prompt is masked in u. Doubles the cost; 0 is off."""
    remasking: Remasking = "low_confidence"
    """Which predictions stay: the likeliest ones after guidance, or positions at random."""
    stop_at_eos: bool = False
    """Generate no further block of a row once a finished one holds an EOS: the rest becomes EOS. Published: off."""

    family: ClassVar[str] = "llada"

    def __post_init__(self):
        _whole(gen_length=self.gen_length, steps=self.steps, block_length=self.block_length)
        _not_negative(temperature=self.temperature, cfg_scale=self.cfg_scale)
        _one_of("remasking", self.remasking, get_args(Remasking))
        if self.gen_length % self.block_length:
            raise UserError(
                f"gen_length = {self.gen_length} is not a multiple of block_length = {self.block_length}: change either"
            )
        if self.steps % self.blocks:
            remedy = f"give {self.blocks} or a multiple of it"
            raise UserError(f"steps = {self.steps} cannot be shared by {self.blocks} blocks: {remedy}")
        if self.stop_at_eos and self.blocks == 1:
            raise UserError(f"stop_at_eos stops between blocks, but block_length = {self.block_length} leaves only one")

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def draw_temperature(self) -> float:
        """Of the choice among `shaped` logits."""
        return self.temperature

    @property
    def blind(self) -> bool:
        """Whether positions are chosen without a look at the predictions, so that only theirs are needed."""
        return self.remasking == "random"

    @property
    def draws_positions(self) -> bool:
        """Whether chance has a part in which positions are revealed."""
        return self.blind

    @property
    def draws(self) -> bool:
        """Whether chance has any part."""
        return self.draws_positions or self.temperature > 0

    def counts(self, step: int, began: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """Masks that go at a step, (B,): LLaDA counts those of the block when it `began`, Dream those `left`."""
        steps = self.steps // self.blocks
        return sampling.reveal_counts(began, steps, step % steps)

    def shaped(self, logits: torch.Tensor) -> torch.Tensor:
        """What tokens are chosen from and confidence is computed on: (M, V) -> (M, V)."""
        return logits

    def confidence(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """How sure the prediction of `tokens` is, higher is surer: (M, V), (M,) -> (M,)."""
        return sampling.token_probability(logits, tokens)

    def scores(self, confidence: torch.Tensor | None, uniform: torch.Tensor | None) -> torch.Tensor:
        """What positions are ranked by, (B, G): confidence (None where blind), uniform noise where it has a part."""
        return uniform if self.blind else confidence

    def reveal(self, step: int, scores: torch.Tensor, eligible: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Positions that are revealed at a step: (B, G) bool."""
        return sampling.top_positions(scores, eligible, counts)


@dataclass(frozen=True)
class DreamGeneration:
    """Dream's sampler: times from 1 to eps, no blocks, no guidance.

    Raises:
        UserError: a value that cannot be used, or an option that would change nothing.
    """

    gen_length: int = 128
    """Tokens generated after the prompt (Dream's max_new_tokens)."""
    steps: int = 128
    """Denoising steps."""
    alg: Algorithm = "entropy"
    """Which masks go first: the surest by top probability (maskgit_plus), by first minus second (topk_margin) or by
    negative entropy; origin: each independently with probability 1 - s/t."""
    temperature: float = 0.0
    """Divides the logits before tokens are drawn; 0 takes the likeliest."""
    top_p: float | None = None
    """Only the likeliest tokens that make up this probability stay, for the choice and for confidence."""
    top_k: int | None = None
    """Only so many likeliest tokens stay, after top_p."""
    alg_temp: float | None = None
    """Positions are drawn from softmax(confidence / alg_temp) without replacement; None or 0 takes the surest."""
    eps: float = 1e-3
    """The last time."""

    family: ClassVar[str] = "dream"
    blocks: ClassVar[int] = 1
    cfg_scale: ClassVar[float] = 0.0
    stop_at_eos: ClassVar[bool] = False

    def __post_init__(self):
        _whole(gen_length=self.gen_length, steps=self.steps)
        _not_negative(temperature=self.temperature, alg_temp=self.alg_temp or 0, eps=self.eps)
        _one_of("alg", self.alg, get_args(Algorithm))
        if not self.eps < 1:
            raise UserError(f"eps = {self.eps} is no time after 1: give a number below 1, such as 0.001")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} is no probability: give a number above 0, up to 1, or leave it out")
        if self.top_k is not None:
            _whole(top_k=self.top_k)
        if self.alg == "origin" and self.alg_temp:
            raise UserError(
                f"alg_temp = {self.alg_temp} means nothing for alg origin, which has no confidence: drop it"
            )
        if self.alg == "origin" and not self.temperature and (self.top_p or self.top_k):
            raise UserError("top_p and top_k change nothing for alg origin at temperature 0: drop them")

    @property
    def draw_temperature(self) -> float:
        """As LLaDA's; `shaped` has divided by the temperature already."""
        return 1.0 if self.temperature else 0.0

    @property
    def blind(self) -> bool:
        """As LLaDA's."""
        return self.alg == "origin"

    @property
    def draws_positions(self) -> bool:
        """As LLaDA's."""
        return self.blind or bool(self.alg_temp)

    @property
    def draws(self) -> bool:
        """As LLaDA's."""
        return self.draws_positions or self.temperature > 0

    def counts(self, step: int, began: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """As LLaDA's; for origin the masks that may go."""
        return left if self.blind else sampling.shared_counts(left, self._share(step))

    def shaped(self, logits: torch.Tensor) -> torch.Tensor:
        """Temperature, then top-p, then top-k: (M, V) -> (M, V)."""
        if self.temperature:
            logits = logits / self.temperature  # (M, V)
        if self.top_p is not None and self.top_p < 1:
            logits = sampling.top_p_filter(logits, self.top_p)  # (M, V)
        return logits if self.top_k is None else sampling.top_k_filter(logits, self.top_k)

    def confidence(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """As LLaDA's, in the sense of `alg`."""
        if self.alg == "entropy":
            return sampling.negative_entropy(logits)
        return sampling.top_margin(logits) if self.alg == "topk_margin" else sampling.token_probability(logits, tokens)

    def scores(self, confidence: torch.Tensor | None, uniform: torch.Tensor | None) -> torch.Tensor:
        """As LLaDA's; with alg_temp the highest k are k draws from softmax(confidence / alg_temp), none put back."""
        if self.alg_temp:
            return confidence.double() / self.alg_temp + sampling.gumbel(uniform)  # (B, G)
        return uniform if self.blind else confidence

    def reveal(self, step: int, scores: torch.Tensor, eligible: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """As LLaDA's."""
        if self.blind:
            return eligible & (scores < self._share(step).to(scores.device))
        return sampling.top_positions(scores, eligible, counts)

    def _share(self, step: int) -> torch.Tensor:
        return sampling.reveal_shares(self.steps, self.eps)[step]


Generation = LLaDAGeneration | DreamGeneration
SAMPLERS: dict[str, type] = {kind.family: kind for kind in (LLaDAGeneration, DreamGeneration)}


def generation_settings(config, values: Mapping[str, object]) -> Generation:
    """The settings of the sampler of a family from option names and values.

    Args:
        config: of a model of the family.

    Raises:
        UserError: an option that the family's sampler has not, or a value that cannot be used.
    """
    kind = SAMPLERS[family_of(config).name]
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            raise UserError(f"{kind.family}'s sampler has no option '{name}'{nearest(name, known)}: {', '.join(known)}")
    return kind(**values)


def low_confidence(config, generated: int, steps: int, block_length: int | None = None) -> Generation:
    """Greedy low-confidence remasking, in the terms of a family's sampler: how a model's own trajectory is made.

    Args:
        config: of a model of the family.
        generated: tokens. steps: denoising steps. block_length: default all at once.
    Raises:
        UserError: as `generation_settings`, also a block length where the sampler has no blocks.
    """
    known = {field.name for field in fields(SAMPLERS[family_of(config).name])}
    values = {"gen_length": generated, "steps": steps}
    if "alg" in known:
        values["alg"] = "maskgit_plus"
    if block_length is not None or "block_length" in known:
        values["block_length"] = block_length or generated
    return generation_settings(config, values)
