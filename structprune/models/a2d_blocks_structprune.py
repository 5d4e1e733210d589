"""A2D trained as BD3LM: block diffusion LMs (arXiv 2503.09573) under the state-dict keys of A2D's.

Copied next to every such checkpoint that structprune writes, beside the files that it imports from.
"""

from .a2d_structprune import (
    A2DLM,
    StructpruneA2DLlamaConfig,
    StructpruneA2DQwen2Config,
    StructpruneA2DQwen3Config,
)
from .blockwise_structprune import BlockDiffusion, BlockSampling

# transformers copies only the files that this one names, not those that they name
from .configuration_structprune import layer_width  # noqa: F401
from .generation_structprune import LLaDASampling  # noqa: F401
from .layers_structprune import Layout  # noqa: F401
from .modeling_structprune import DecoderLM  # noqa: F401
from .rotary_structprune import rotary_tables  # noqa: F401
from .sampling_structprune import gumbel_choice  # noqa: F401


# an __init__ in each: transformers 5 gives a class without one its own, which leaves out the base's
class StructpruneA2DQwen3BlocksConfig(StructpruneA2DQwen3Config):
    """As of the same model in one piece, with `block_size`: tokens of a block."""

    model_type = "structprune_a2d_qwen3_blocks"

    def __init__(self, block_size=32, **kwargs):
        self.block_size = block_size
        super().__init__(**kwargs)


class StructpruneA2DLlamaBlocksConfig(StructpruneA2DLlamaConfig):
    """As of the same model in one piece, with `block_size`: tokens of a block."""

    model_type = "structprune_a2d_llama_blocks"

    def __init__(self, block_size=32, **kwargs):
        self.block_size = block_size
        super().__init__(**kwargs)


class StructpruneA2DQwen2BlocksConfig(StructpruneA2DQwen2Config):
    """As of the same model in one piece, with `block_size`: tokens of a block."""

    model_type = "structprune_a2d_qwen2_blocks"

    def __init__(self, block_size=32, **kwargs):
        self.block_size = block_size
        super().__init__(**kwargs)


class A2DBlocksLM(BlockDiffusion, BlockSampling, A2DLM):  # type: ignore[misc]
    """A2D's decoder that fills blocks from left to right, each after clean text."""


class StructpruneA2DQwen3Blocks(A2DBlocksLM):
    config_class = StructpruneA2DQwen3BlocksConfig


class StructpruneA2DLlamaBlocks(A2DBlocksLM):
    config_class = StructpruneA2DLlamaBlocksConfig


class StructpruneA2DQwen2Blocks(A2DBlocksLM):
    config_class = StructpruneA2DQwen2BlocksConfig
