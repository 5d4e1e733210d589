"""A2D: Qwen3, Llama and Qwen2.5 made bidirectional and trained as masked diffusion LMs (MDLM arXiv 2406.07524).

One row for each of dllm's model types, which differ in the norms of heads, biases and the marks around text.
"""

from dataclasses import replace
from pathlib import Path

from structprune.models import a2d_structprune as classes
from structprune.models.dream import DREAM
from structprune.models.family import Family

COMPUTED: dict[str, tuple] = {"hidden_act": ("silu",), "partial_rotary_factor": (1.0,)}  # by all three
UNBIASED = {"attention_bias": (False,)}
WHOLE_TEXT = {"use_sliding_window": (False,)}

A2D_QWEN3 = replace(
    DREAM,
    name="a2d-qwen3",
    model_types=("a2d-qwen3",),
    architecture="A2DQwen3LMHeadModel",
    config_class=classes.StructpruneA2DQwen3Config,
    model_class=classes.StructpruneA2DQwen3,
    required=(*DREAM.required, "num_key_value_heads", "head_dim"),  # whose defaults are another model's sizes
    sampler="rounded",
    likelihood="fixed_count",
    text_edges="none",
    published=None,
    supported=COMPUTED | UNBIASED | WHOLE_TEXT,
    rope_types=("default", "llama3"),
    gguf=None,
    code=(Path(classes.__file__),),
)
A2D_LLAMA: Family = replace(
    A2D_QWEN3,
    name="a2d-llama",
    model_types=("a2d-llama",),
    architecture="A2DLlamaLMHeadModel",
    config_class=classes.StructpruneA2DLlamaConfig,
    model_class=classes.StructpruneA2DLlama,
    required=(*DREAM.required, "num_key_value_heads"),
    text_edges="bos",
    supported=COMPUTED | UNBIASED | {"mlp_bias": (False,)},
)
A2D_QWEN2: Family = replace(
    A2D_QWEN3,
    name="a2d-qwen2",
    model_types=("a2d-qwen2",),
    architecture="A2DQwen2LMHeadModel",
    config_class=classes.StructpruneA2DQwen2Config,
    model_class=classes.StructpruneA2DQwen2,
    required=(*DREAM.required, "num_key_value_heads"),
    supported=COMPUTED | WHOLE_TEXT,
)
