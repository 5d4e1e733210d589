"""The table of model families: a row is all that the rest of the package knows about a family."""

from typing import Any

from structprune.errors import UserError, nearest
from structprune.models.a2d import (
    A2D_LLAMA,
    A2D_LLAMA_BLOCKS,
    A2D_QWEN2,
    A2D_QWEN2_BLOCKS,
    A2D_QWEN3,
    A2D_QWEN3_BLOCKS,
)
from structprune.models.dream import DREAM
from structprune.models.family import ROLES as ROLES  # re-exported
from structprune.models.family import Family
from structprune.models.llada import LLADA
from structprune.models.llada2 import LLADA2
from structprune.models.llada_moe import LLADA_MOE
from structprune.models.nemotron import NEMOTRON
from structprune.models.sdar import SDAR

FAMILIES: list[Family] = [
    LLADA, DREAM, A2D_QWEN3, A2D_LLAMA, A2D_QWEN2, A2D_QWEN3_BLOCKS, A2D_LLAMA_BLOCKS, A2D_QWEN2_BLOCKS, SDAR,
    LLADA_MOE, LLADA2, NEMOTRON,
]  # fmt: skip


def register_family(family: Family) -> None:
    """Add a family from outside the package: loading, pruning, saving, generation and evaluation then know it.

    Raises:
        UserError: its name, a model type or its config class is taken.
    """
    for other in FAMILIES:
        for kind, value in _identities(family):
            if (kind, value) in _identities(other):
                raise UserError(f"family '{family.name}': {kind} '{value}' belongs to family '{other.name}': rename it")
    FAMILIES.append(family)


def _identities(family: Family) -> list[tuple[str, str]]:
    """What tells families apart; `family_of` compares config classes by name."""
    types = [("model_type", value) for value in (*family.model_types, family.config_class.model_type)]
    return [("name", family.name), *types, ("config class", family.config_class.__name__)]


def family_of(config: Any) -> Family:
    """The family that a loaded model's config belongs to.

    Raises:
        TypeError: `config` is not of one of structprune's model classes.
    """
    name = type(config).__name__
    for family in FAMILIES:
        if name == family.config_class.__name__:
            return family
    raise TypeError(f"{name} is not a structprune model config; load models with structprune.load_model")


def family_named(name: str) -> Family:
    """The family of a name, as reports and plans keep it.

    Raises:
        UserError: there is none.
    """
    for family in FAMILIES:
        if name == family.name:
            return family
    names = [family.name for family in FAMILIES]
    raise UserError(f"unknown family '{name}'{nearest(name, names)}: {', '.join(names)} are registered")
