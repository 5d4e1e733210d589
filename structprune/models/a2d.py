"""A2D: Qwen3, Llama and Qwen2.5 made bidirectional and trained as masked diffusion LMs (MDLM arXiv 2406.07524).

One row for each of dllm's model types, which differ in the norms of heads, biases and the marks around text; and one
for those that were trained in blocks (BD3LM, arXiv 2503.09573), whose files are the same but for `block_size`.
"""

from dataclasses import replace
from pathlib import Path

from structprune.models import a2d_blocks_structprune as in_blocks
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


def _in_blocks(family: Family, config_class, model_class) -> Family:
    """The row of models of the same files that were trained as BD3LM."""
    folder = Path(in_blocks.__file__)
    supported = {**family.supported, "right_shift_logits": (False,)}  # a block's first token has no place before it
    return replace(
        family,
        name=f"{family.name}-blocks",
        config_class=config_class,
        model_class=model_class,
        required=(*family.required, "block_size"),
        sampler="aligned",
        supported=supported,
        code=(*family.code, folder.with_name("blockwise_structprune.py"), folder),
    )


A2D_QWEN3_BLOCKS = _in_blocks(A2D_QWEN3, in_blocks.StructpruneA2DQwen3BlocksConfig, in_blocks.StructpruneA2DQwen3Blocks)
A2D_LLAMA_BLOCKS = _in_blocks(A2D_LLAMA, in_blocks.StructpruneA2DLlamaBlocksConfig, in_blocks.StructpruneA2DLlamaBlocks)
A2D_QWEN2_BLOCKS = _in_blocks(A2D_QWEN2, in_blocks.StructpruneA2DQwen2BlocksConfig, in_blocks.StructpruneA2DQwen2Blocks)
