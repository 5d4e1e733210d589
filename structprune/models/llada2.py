"""LLaDA2 (arXiv 2512.15745): blocks as SDAR's, experts in groups beside shared ones, and heads that turn in part."""

from pathlib import Path

from structprune.models import llada2_structprune
from structprune.models.dream import DREAM
from structprune.models.family import Family

LLADA2 = Family(
    name="llada2",
    model_types=("llada2_moe",),
    architecture="LLaDA2MoeModelLM",
    config_class=llada2_structprune.StructpruneLLaDA2Config,
    model_class=llada2_structprune.StructpruneLLaDA2,
    blocks=DREAM.blocks,
    embedding="model.word_embeddings.weight",
    width_keys={
        "query_heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "channels": "moe_intermediate_size",
        "experts": "num_experts",
        "shared": "shared_intermediate_size",
    },
    keys=DREAM.keys,
    required=(
        "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "moe_intermediate_size",
        "num_experts", "num_experts_per_tok", "vocab_size",
    ),  # fmt: skip
    schedule="uniform",
    sampler="aligned",
    likelihood="fixed_count",
    supported={
        "hidden_act": ("silu",), "use_qkv_bias": (False,), "use_bias": (False,), "use_qk_norm": (True, None),
        "use_rmsnorm": (True, None), "norm_head": (False,), "norm_topk_prob": (True, None), "norm_softmax": (False,),
        "score_function": ("sigmoid", None), "moe_router_enable_expert_bias": (True, None),
        "use_sliding_window": (False,), "rope_scaling": (None,),
    },
    joined={"attention.query_key_value": llada2_structprune.PROJECTIONS},
    layout_class=llada2_structprune.JoinedLLaDA2,
    code=tuple(
        Path(llada2_structprune.__file__).with_name(f"{name}_structprune.py")
        for name in ("blockwise", "experts", "llada2")
    ),
)  # fmt: skip
