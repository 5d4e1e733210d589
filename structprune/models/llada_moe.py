"""LLaDA-MoE (arXiv 2509.24389): LLaDA's training and sampler, Qwen3's attention, and experts as in OLMoE."""

from pathlib import Path

from structprune.models import llada_moe_structprune
from structprune.models.dream import DREAM
from structprune.models.family import Family

LLADA_MOE = Family(
    name="llada-moe",
    model_types=("llada", "llada_moe", "lladamoe"),  # by release; "llada" is LLaDA's too, the architecture is not
    architecture="LLaDAMoEModelLM",
    config_class=llada_moe_structprune.StructpruneLLaDAMoEConfig,
    model_class=llada_moe_structprune.StructpruneLLaDAMoE,
    blocks=DREAM.blocks,
    embedding=DREAM.embedding,
    width_keys={
        "query_heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "channels": "expert_intermediate_size",
        "experts": "num_experts",
        "shared": "shared_expert_intermediate_size",
    },
    keys=DREAM.keys,
    required=(
        "hidden_size", "num_attention_heads", "num_hidden_layers", "expert_intermediate_size", "num_experts",
        "num_experts_per_tok", "vocab_size",
    ),  # fmt: skip
    schedule="levels",
    sampler="blockwise",
    likelihood="fixed_count",
    supported={
        "hidden_act": ("silu",), "attention_bias": (False,), "tie_word_embeddings": (False,), "qk_layernorm": (True,),
        "clip_qkv": (None,), "partial_rotary_factor": (1, None), "moe_router_enable_expert_bias": (False, None),
        "moe_router_score_function": ("softmax", None), "rope_scaling": (None,),
    },
    code=tuple(
        Path(llada_moe_structprune.__file__).with_name(f"{name}_structprune.py") for name in ("experts", "llada_moe")
    ),
)  # fmt: skip
