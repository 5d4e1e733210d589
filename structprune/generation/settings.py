"""Every choice of `structprune generate`, and the sampler's settings that they make for a model."""

from typing import Any, Literal

from pydantic import Field

from structprune.config import ModelSettings
from structprune.config.sections import Section, Sections
from structprune.errors import UserError
from structprune.generation.cached import check_cache
from structprune.generation.samplers import (
    Algorithm,
    Generation,
    free_options,
    generation_settings,
    sampler_of,
)

BLOCK_LENGTH = 32  # the default of block-wise generation, with which block-wise caches are published


class GenerationSettings(Section):
    gen_length: int = Field(128, ge=1)
    """Tokens generated after the prompt."""
    steps: int | None = Field(None, ge=1)
    """Denoising steps, of which blocks have equal shares (block diffusion: rounded up); with a threshold, at most so
    many. Default: gen_length, a token a step."""
    block_length: int | None = Field(None, ge=1)
    """LLaDA, A2D: tokens of a block; blocks are finished from left to right. Default: 32 where gen_length is a multiple
    of it, else gen_length. Block diffusion: the model's own."""
    threshold: float | None = Field(None, gt=0, le=1)
    """Also reveal every prediction with at least this probability: fewer steps. Dream's `alg` is then maskgit_plus
    where none is given."""
    temperature: float | None = Field(None, ge=0)
    """Of the choice of tokens. Default: 0, the likeliest."""
    remasking: Literal["low_confidence", "random", "sequential"] | None = None
    """Which predictions are revealed: the surest, those at random positions (LLaDA, A2D), or the first
    (sequential: SDAR, LLaDA2, BD3LM). Default: low_confidence."""
    cfg_scale: float | None = Field(None, ge=0)
    """LLaDA, A2D: scale of classifier-free guidance, which doubles the cost. Default: 0, off."""
    stop_at_eos: bool | None = None
    """All but Dream: generate no block after one that holds an EOS. Default: false; Nemotron's and LLaDA2's own code
    ends rows."""
    alg: Algorithm | None = None
    """Dream: which predictions are revealed first. Default: entropy."""
    alg_temp: float | None = Field(None, ge=0)
    """Dream: draw positions at this temperature of their confidence. Default: the surest."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Dream, SDAR, LLaDA2, BD3LM: choose among the likeliest tokens that make up this probability. Default: all."""
    top_k: int | None = Field(None, ge=1)
    """Dream, SDAR, LLaDA2, BD3LM: choose among so many likeliest tokens. Default: all."""
    eps: float | None = Field(None, ge=0, lt=1)
    """Dream: the last time. Default: 0.001."""
    cache: Literal["none", "prefix", "dual"] = "none"
    """Keys and values that are cached while a block is denoised: faster, and approximate, but exact in block
    diffusion. dual needs several blocks, and tokens that see what follows theirs."""
    refresh: int | None = Field(None, ge=1)
    """Steps after which the cache is rebuilt within a block. Default: never."""
    chat: bool = False
    """Prompts go through the tokenizer's chat template (Instruct checkpoints)."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Random seed, where anything is drawn."""
    batch: int = Field(8, ge=1)
    """Prompts in a forward pass."""


class GenerateConfig(Sections):
    """Every choice of a generation, by section."""

    model: ModelSettings = ModelSettings()
    generation: GenerationSettings = GenerationSettings()


OF_RUN = ("cache", "refresh", "chat", "seed", "batch")  # what no sampler has


def sampler_settings(config: Any, settings: GenerationSettings) -> Generation:
    """The sampler's settings for the family of a model's config.

    Raises:
        UserError: an option that the family's sampler does not have or allow.
    """
    given = settings.model_dump(exclude={*OF_RUN})
    values = {name: value for name, value in given.items() if value is not None}
    known, length = free_options(config), settings.gen_length
    values.setdefault("steps", length)
    if "block_length" in known:
        values.setdefault("block_length", BLOCK_LENGTH if length % BLOCK_LENGTH == 0 else length)
    if settings.threshold is not None:
        values = {**sampler_of(config).by_confidence, **values}
    sampler = generation_settings(config, values)
    check_cache(settings.cache, sampler)
    if settings.refresh is not None and settings.cache == "none":
        raise UserError(f"refresh = {settings.refresh} has no effect without a cache: set cache = prefix, or drop it")
    return sampler
