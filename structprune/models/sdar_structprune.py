"""SDAR: Qwen3 trained as a block diffusion LM (arXiv 2510.06303), under the state-dict keys of `SDARForCausalLM`.

Copied next to every SDAR checkpoint that structprune writes, beside the files that it imports from.
"""

from .a2d_structprune import A2DLM, A2DConfig
from .blockwise_structprune import BlockDiffusion, BlockSampling

# transformers copies only the files that this one names, not those that they name
from .configuration_structprune import layer_width  # noqa: F401
from .generation_structprune import LLaDASampling  # noqa: F401
from .layers_structprune import Layout  # noqa: F401
from .modeling_structprune import DecoderLM  # noqa: F401
from .rotary_structprune import rotary_tables  # noqa: F401
from .sampling_structprune import gumbel_choice  # noqa: F401


class StructpruneSDARConfig(A2DConfig):
    """Qwen3's key names; `block_size`: tokens of a block, 4 where config.json does not say."""

    model_type = "structprune_sdar"
    qkv_bias, qk_norm = False, True

    def __init__(self, block_size=4, **kwargs):
        self.block_size = block_size
        super().__init__(**kwargs)


class StructpruneSDAR(BlockDiffusion, BlockSampling, A2DLM):  # type: ignore[misc]
    config_class = StructpruneSDARConfig
