"""LLaDA-MoE: LLaDA with Qwen3's attention and experts as in OLMoE, under the state-dict keys of `LLaDAMoEModelLM`.

Copied next to every LLaDA-MoE checkpoint that structprune writes, beside the files that it imports from.
Paper: LLaDA-MoE arXiv 2509.24389.
"""

from typing import Any

from .configuration_structprune import StructpruneDreamConfig
from .experts_structprune import ExpertBlock
from .generation_structprune import LLaDASampling

# transformers copies only the files that this one names, not those that they name
from .layers_structprune import DreamBlock  # noqa: F401
from .modeling_structprune import DecoderLM
from .rotary_structprune import rotary_tables  # noqa: F401
from .sampling_structprune import gumbel_choice  # noqa: F401


class StructpruneLLaDAMoEConfig(StructpruneDreamConfig):
    """LLaDA-MoE's key names; `per_layer_config` may name `num_experts` and `expert_intermediate_size` too.

    A layer with 0 `num_experts` has a plain MLP of `expert_intermediate_size` channels.
    """

    model_type = "structprune_llada_moe"
    qkv_bias, qk_norm = False, True
    attribute_map = {"intermediate_size": "expert_intermediate_size"}
    width_names = (
        "num_attention_heads", "num_key_value_heads", "expert_intermediate_size", "num_experts",
        "shared_expert_intermediate_size",
    )  # fmt: skip

    def __init__(
        self, expert_intermediate_size=1024, num_experts=64, num_experts_per_tok=8,
        shared_expert_intermediate_size=None, rope_theta=50000.0, rms_norm_eps=1e-5, mask_token_id=156895, **kwargs,
    ):  # fmt: skip
        if num_experts_per_tok > num_experts:
            raise ValueError(f"num_experts_per_tok = {num_experts_per_tok} of num_experts = {num_experts}")
        if 0 in (kwargs.pop("moe_layer_freq", None) or ()):
            raise ValueError("moe_layer_freq names layers without experts")
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.shared_expert_intermediate_size = shared_expert_intermediate_size or 0
        super().__init__(
            intermediate_size=kwargs.pop("intermediate_size", expert_intermediate_size), rope_theta=rope_theta,
            rms_norm_eps=rms_norm_eps, mask_token_id=mask_token_id, **kwargs,
        )  # fmt: skip

    def in_own_layout(self, values: dict) -> dict:
        own: dict[str, Any] = {"moe_layer_freq": [1] * self.num_hidden_layers}
        # the family's own code tests for None
        return values | own | {"shared_expert_intermediate_size": self.shared_expert_intermediate_size or None}


class LLaDAMoEBlock(ExpertBlock):
    shared_path = "shared_expert"


class StructpruneLLaDAMoE(LLaDASampling, DecoderLM):
    config_class = StructpruneLLaDAMoEConfig
    block_class = LLaDAMoEBlock
    _no_split_modules = ["LLaDAMoEBlock"]
