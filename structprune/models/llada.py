"""LLaDA, LLaDA-1.5 and MMaDA's text tower (arXiv 2502.09992)."""

from structprune.models.configuration_structprune import StructpruneLLaDAConfig
from structprune.models.family import Family, GgufLoader
from structprune.models.modeling_structprune import StructpruneLLaDA

LLADA = Family(
    name="llada",
    model_types=("llada", "mmada"),
    architecture="LLaDAModelLM",
    config_class=StructpruneLLaDAConfig,
    model_class=StructpruneLLaDA,
    blocks="model.transformer.blocks",
    embedding="model.transformer.wte.weight",
    width_keys={"query_heads": "n_heads", "kv_heads": "n_kv_heads", "channels": "mlp_hidden_size"},
    keys={"hidden": "d_model", "depth": "n_layers", "vocabulary": "embedding_size", "positions": "max_sequence_length"},
    required=("d_model", "n_heads", "n_layers", "mlp_hidden_size", "vocab_size"),
    schedule="levels",
    sampler="blockwise",
    likelihood="fixed_count",
    published="llada",
    ignored=("tie_word_embeddings",),  # its code ties the head by weight_tying
    gguf=GgufLoader("llada", "uniform", interleaved=True),
    supported={
        "block_type": ("llama",), "layer_norm_type": ("rms",), "activation_type": ("silu",), "rope": (True,),
        "alibi": (False,), "weight_tying": (False,), "attention_layer_norm": (False,), "input_emb_norm": (False,),
        "scale_logits": (False,), "bias_for_layer_norm": (False, None), "rope_full_precision": (True,),
        "layer_norm_with_affine": (True,), "rope_scaling": (None,),
    },
)  # fmt: skip
