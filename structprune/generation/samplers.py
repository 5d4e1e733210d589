"""The samplers: their settings, and their parts in a denoising step of `generate` (docs/methods.md section 6).

LLaDA's (arXiv 2502.09992) finishes blocks from left to right and remasks within a block; A2D's is the same with rounded
numbers of tokens. Dream's (arXiv 2508.15487)
reveals shares of the masks between times from 1 to eps. Shapes as in `sampling`: B rows, G generated positions, M
predicted positions, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch

from structprune.errors import UserError, nearest
from structprune.generation.aligned import AlignedGeneration
from structprune.generation.checks import check_not_negative, check_one_of, check_whole
from structprune.generation.sampler import Generation as Generation  # re-exported
from structprune.generation.twofold import TwofoldGeneration
from structprune.models import sampling_structprune as sampling
from structprune.models.families import family_of

Remasking = Literal["low_confidence", "random"]
Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]


@dataclass(frozen=True)
class LLaDAGeneration(Generation):
    """LLaDA's block-wise (semi-autoregressive) sampler with remasking; defaults as published, one token a step."""

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

    step_counts = staticmethod(sampling.reveal_counts)
    single_block = "block_length leaves only one block"
    by_confidence = {"remasking": "low_confidence"}

    def __post_init__(self):
        super().__post_init__()
        check_whole(block_length=self.block_length)
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
    def no_probability(self) -> str | None:
        return "remasking = random" if self.blind else None

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def draw_temperature(self) -> float:
        return self.temperature

    @property
    def blind(self) -> bool:
        return self.remasking == "random"

    def counts(self, step: int, began: torch.Tensor, remaining: torch.Tensor) -> torch.Tensor:
        steps = self.steps // self.blocks
        return self.step_counts(began, steps, step % steps)


@dataclass(frozen=True)
class DreamGeneration(Generation):
    """Dream's sampler: times from 1 to eps, no blocks, no guidance."""

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

    single_block = "this sampler has no blocks"
    by_confidence = {"alg": "maskgit_plus"}

    def __post_init__(self):
        super().__post_init__()
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
    def no_probability(self) -> str | None:
        return f"alg = {self.alg}" if self.alg in ("entropy", "origin") else None

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
        return sampling.top_margin(logits) if self.alg == "topk_margin" else super().confidence(logits, tokens)

    def scores(self, confidence: torch.Tensor | None, uniform: torch.Tensor | None) -> torch.Tensor:
        """With alg_temp the highest k are k draws from softmax(confidence / alg_temp) without replacement."""
        scores = super().scores(confidence, uniform)  # (B, G)
        if not self.alg_temp:
            return scores
        assert uniform is not None
        return scores.double() / self.alg_temp + sampling.gumbel(uniform)  # (B, G)

    def reveal(self, step: int, scores: torch.Tensor, eligible: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if self.blind:
            return eligible & (scores < self._share(step).to(scores.device))
        return super().reveal(step, scores, eligible, counts)

    def _share(self, step: int) -> torch.Tensor:
        return sampling.reveal_shares(self.steps, self.eps)[step]


@dataclass(frozen=True)
class A2DGeneration(LLaDAGeneration):
    """LLaDA's sampler where a step reveals the expected number of masks of a linear schedule, rounded."""

    step_counts = staticmethod(sampling.rounded_counts)


SAMPLERS: dict[str, type[Generation]] = {
    "blockwise": LLaDAGeneration,
    "timesteps": DreamGeneration,
    "rounded": A2DGeneration,
    "aligned": AlignedGeneration,
    "twofold": TwofoldGeneration,
}


def sampler_of(config) -> type[Generation]:
    """The sampler of the family of a model's config."""
    return SAMPLERS[family_of(config).sampler]


def sampler_options(config) -> tuple[str, ...]:
    """Names of the options of that sampler."""
    return tuple(field.name for field in fields(sampler_of(config)))


def free_options(config) -> tuple[str, ...]:
    """Names of the options that the model does not decide."""
    return tuple(name for name in sampler_options(config) if name not in sampler_of(config).of_config)


def generation_settings(config, values: Mapping[str, object]) -> Generation:
    """Settings of the sampler of a model's family, from option names and values.

    Raises:
        UserError: an option that the sampler does not have, or a value that cannot be used.
    """
    known = list(sampler_options(config))
    for name in values:
        if name not in known:
            family = family_of(config).name
            raise UserError(f"{family}'s sampler has no option '{name}'{nearest(name, known)}: {', '.join(known)}")
    sampler = sampler_of(config)
    values = {option: getattr(config, key) for option, key in sampler.of_config.items()} | dict(values)
    return sampler(**values)  # type: ignore[arg-type]  # checked on construction


def begins(config) -> bool:
    """Whether blocks of a generation begin with a token that is predicted causally, and was never a mask."""
    return sampler_of(config).begins


def check_states(config, option: str) -> None:
    """Raise UserError where states of a generation are not denoised step by step, which `option` asks for."""
    if begins(config):
        family = family_of(config).name
        reason = f"{family}'s blocks begin with a token that was never a mask"
        raise UserError(f"{option} is not possible for {family}: {reason}, so use forward")


def low_confidence(config, generated: int, steps: int, block_length: int | None = None) -> Generation:
    """Greedy low-confidence remasking in the terms of a family's sampler: how a model's own trajectory is made.

    Args:
        generated: tokens. block_length: default all at once.
    Raises:
        UserError: as `generation_settings`, also a block length where the sampler has no blocks.
    """
    values = {"gen_length": generated, "steps": steps, **sampler_of(config).by_confidence}
    if block_length is not None or "block_length" in free_options(config):
        values["block_length"] = block_length or generated
    return generation_settings(config, values)
