"""The explicit table of model families: everything that differs between them, as data."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Mapping

from structprune.models.configuration_structprune import StructpruneDreamConfig, StructpruneLLaDAConfig
from structprune.models.modeling_structprune import DiffusionLM, StructpruneDream, StructpruneLLaDA

ROLES = ("query", "key", "value", "attention_output", "gate", "up", "down")


@dataclass(frozen=True)
class Family:
    """One family's names.

    Attributes:
        model_types: `model_type` values of official checkpoints that load into this family.
        projections: role (`ROLES`) -> path of the `nn.Linear` inside a block.
        core: path of the attention seam inside a block.
        width_keys: `query_heads`, `kv_heads`, `channels` -> config key, which is also the `per_layer_config` key.
        keys: other roles (`hidden`, `depth`, `vocabulary`, `positions`) -> config key.
        required: config keys an official config.json must have.
        schedule: how calibration draws noise levels (METHODS.md section 2): "levels" or "uniform".
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config_class: type
    model_class: type[DiffusionLM]
    blocks: str
    embedding: str
    projections: Mapping[str, str]
    core: str
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
    blocks="model.transformer.blocks",
    embedding="model.transformer.wte.weight",
    projections=MappingProxyType(
        {
            "query": "q_proj",
            "key": "k_proj",
            "value": "v_proj",
            "attention_output": "attn_out",
            "gate": "ff_proj",
            "up": "up_proj",
            "down": "ff_out",
        }
    ),
    core="core",
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
    blocks="model.layers",
    embedding="model.embed_tokens.weight",
    projections=MappingProxyType(
        {
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "attention_output": "self_attn.o_proj",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        }
    ),
    core="self_attn.core",
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
    raise TypeError(f"{type(config).__name__} is not a structprune model config; load models with structprune.load_model")
