"""The table of samplers, and the settings of the one that a model's family uses."""

from collections.abc import Mapping
from dataclasses import fields

from structprune.errors import UserError, nearest
from structprune.generation.blockwise import LLaDAGeneration
from structprune.generation.sampler import Generation
from structprune.generation.timesteps import DreamGeneration
from structprune.models.families import family_of

SAMPLERS: dict[str, type[Generation]] = {"blockwise": LLaDAGeneration, "timesteps": DreamGeneration}


def sampler_of(config) -> type[Generation]:
    """The sampler of the family of a model's config."""
    return SAMPLERS[family_of(config).sampler]


def sampler_options(config) -> tuple[str, ...]:
    """Names of the options of that sampler."""
    return tuple(field.name for field in fields(sampler_of(config)))  # type: ignore[arg-type]  # each is a dataclass


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
    return sampler_of(config)(**values)


def low_confidence(config, generated: int, steps: int, block_length: int | None = None) -> Generation:
    """Greedy low-confidence remasking in the terms of a family's sampler: how a model's own trajectory is made.

    Args:
        config: of a model of the family.
        generated: tokens. steps: denoising steps. block_length: default all at once.
    Raises:
        UserError: as `generation_settings`, also a block length where the sampler has no blocks.
    """
    values = {"gen_length": generated, "steps": steps, **sampler_of(config).by_confidence}
    if block_length is not None or "block_length" in sampler_options(config):
        values["block_length"] = block_length or generated
    return generation_settings(config, values)
