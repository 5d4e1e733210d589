"""A2D: Qwen3, Llama and Qwen2.5 as masked diffusion LMs, with the layers of their causal origins and a full mask.

Copied next to every A2D checkpoint that structprune writes, beside the files that it imports from.
Keys and weights have the names of `transformers`' decoders. Papers: MDLM arXiv 2406.07524, Qwen3 arXiv 2505.09388.
"""

from typing import Any

from .configuration_structprune import StructpruneDreamConfig
from .generation_structprune import A2DSampling

# transformers copies only the files that this one names, not those that they name
from .layers_structprune import Layout  # noqa: F401
from .modeling_structprune import DecoderLM
from .rotary_structprune import LLAMA3_ROPE
from .sampling_structprune import rounded_counts  # noqa: F401


class A2DConfig(StructpruneDreamConfig):
    """Qwen's and Llama's key names, with optional per-layer widths as in Dream's.

    `tie_word_embeddings`: the head follows the embedding. `right_shift_logits`: position i predicts token i + 1.
    `rotary_scaling`: see `scaled_frequencies`; under the family's own keys it is `rope_scaling`.
    """

    reads_head_dim = True

    def __init__(
        self, rope_theta=10000.0, mask_token_id=151669, right_shift_logits=False, rotary_scaling=None, **kwargs
    ):  # fmt: skip
        rope = (kwargs.pop("rope_parameters", None) or {}) | (kwargs.pop("rope_scaling", None) or {})
        if rope.get("rope_type", rope.get("type")) == "llama3":
            rotary_scaling = {"rope_type": "llama3"} | {key: rope[key] for key in LLAMA3_ROPE}
        self.right_shift_logits, self.rotary_scaling = right_shift_logits, rotary_scaling
        super().__init__(rope_theta=rope.get("rope_theta", rope_theta), mask_token_id=mask_token_id, **kwargs)

    def _tied(self, values: dict) -> bool:
        return bool(values.pop("tie_word_embeddings", False))

    def in_own_layout(self, values: dict) -> dict:
        own: dict[str, Any] = {"rope_scaling": self.rotary_scaling, "tie_word_embeddings": self.tie_word_embeddings}
        absent = ("rotary_scaling", *(() if self.right_shift_logits else ("right_shift_logits",)))
        return {key: value for key, value in values.items() if key not in absent} | own


# each has an __init__, because transformers 5 gives a class without one another, which ignores that of its base


class StructpruneA2DQwen3Config(A2DConfig):
    model_type = "structprune_a2d_qwen3"
    qkv_bias, qk_norm = False, True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class StructpruneA2DLlamaConfig(A2DConfig):
    model_type = "structprune_a2d_llama"
    qkv_bias = False
    reads_head_dim = False  # some releases refuse a width that is not a multiple of the heads

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class StructpruneA2DQwen2Config(A2DConfig):
    model_type = "structprune_a2d_qwen2"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class A2DLM(A2DSampling, DecoderLM):
    """A decoder that attends both ways and fills masks in, under the state-dict keys of its causal origin."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.shifted = self.is_shifted(config)


class StructpruneA2DQwen3(A2DLM):
    config_class = StructpruneA2DQwen3Config


class StructpruneA2DLlama(A2DLM):
    config_class = StructpruneA2DLlamaConfig


class StructpruneA2DQwen2(A2DLM):
    config_class = StructpruneA2DQwen2Config
