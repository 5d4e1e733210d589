"""The explicit table of model families: everything that differs between them, as data."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Mapping

from structprune.models.configuration_structprune import StructpruneDreamConfig, StructpruneLLaDAConfig
from structprune.models.modeling_structprune import (
    Block,
    DiffusionLM,
    DreamBlock,
    LLaDABlock,
    StructpruneDream,
    StructpruneLLaDA,
)

ROLES = ("query", "key", "value", "attention_output", "gate", "up", "down")


@dataclass(frozen=True)
class Family:
    """One family's names.

    Attributes:
        model_types: `model_type` values of official checkpoints that load into this family.
        block_class: its `roles` name every part of a block (`ROLES` are the linears, "core" the attention seam).
        width_keys: `query_heads`, `kv_heads`, `channels` -> config key, which is also the `per_layer_config` key.
        keys: other roles (`hidden`, `depth`, `vocabulary`, `positions`) -> config key.
        required: config keys an official config.json must have.
        schedule: how calibration draws noise levels (docs/methods.md section 2): "levels" or "uniform".
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config_class: type
    model_class: type[DiffusionLM]
    block_class: type[Block]
    blocks: str
    embedding: str
    width_keys: Mapping[str, str]
    keys: Mapping[str, str]
    required: tuple[str, ...]
    schedule: str


LLADA = Family(
    name="llada",
    model_types=("llada", "mmada"),
    architectures=("LLaDAModelLM", "MMadaModelLM"),
    config_class=StructpruneLLaDAConfig,
    model_class=StructpruneLLaDA,
    block_class=LLaDABlock,
    blocks="model.transformer.blocks",
    embedding="model.transformer.wte.weight",
    width_keys=MappingProxyType({"query_heads": "n_heads", "kv_heads": "n_kv_heads", "channels": "mlp_hidden_size"}),
    keys=MappingProxyType(
        {"hidden": "d_model", "depth": "n_layers", "vocabulary": "embedding_size", "positions": "max_sequence_length"}
    ),
    required=("d_model", "n_heads", "n_layers", "mlp_hidden_size", "vocab_size"),
    schedule="levels",
)

DREAM = Family(
    name="dream",
    model_types=("Dream",),
    architectures=("DreamModel",),
    config_class=StructpruneDreamConfig,
    model_class=StructpruneDream,
    block_class=DreamBlock,
    blocks="model.layers",
    embedding="model.embed_tokens.weight",
    width_keys=MappingProxyType(
        {"query_heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "channels": "intermediate_size"}
    ),
    keys=MappingProxyType(
        {
            "hidden": "hidden_size",
            "depth": "num_hidden_layers",
            "vocabulary": "vocab_size",
            "positions": "max_position_embeddings",
        }
    ),
    required=("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size"),
    schedule="uniform",
)

FAMILIES = (LLADA, DREAM)


def family_of(config) -> Family:
    """The family a loaded model's config belongs to.

    Raises:
        TypeError: `config` is not of one of structprune's model classes.
    """
    for family in FAMILIES:
        if type(config).__name__ == family.config_class.__name__:
            return family
    kind = type(config).__name__
    raise TypeError(f"{kind} is not a structprune model config; load models with structprune.load_model")
