"""Dream, Dream-Coder and DiffuCoder (arXiv 2508.15487), whose layout is Qwen2's."""

from structprune.models.configuration_structprune import StructpruneDreamConfig
from structprune.models.family import Family, GgufLoader
from structprune.models.modeling_structprune import StructpruneDream

DREAM = Family(
    name="dream",
    model_types=("Dream",),
    architecture="DreamModel",
    config_class=StructpruneDreamConfig,
    model_class=StructpruneDream,
    blocks="model.layers",
    embedding="model.embed_tokens.weight",
    width_keys={
        "query_heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "channels": "intermediate_size",
    },
    keys={
        "hidden": "hidden_size",
        "depth": "num_hidden_layers",
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
    },
    required=("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size"),
    schedule="uniform",
    sampler="timesteps",
    likelihood="independent",
    text_edges="bos_eos",
    published="dream",
    gguf=GgufLoader("dream", "official", interleaved=False),
    supported={
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
        "hidden_act": ("silu",),
        "tie_word_embeddings": (False,),
    },
)
