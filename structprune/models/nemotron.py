"""Nemotron-Labs-Diffusion 3B, 8B and 14B: Ministral 3's shape, a block diffusion LM that is a causal one too."""

from dataclasses import replace
from pathlib import Path

from structprune.models import nemotron_structprune
from structprune.models.a2d import COMPUTED, UNBIASED
from structprune.models.dream import DREAM

NEMOTRON = replace(
    DREAM,
    name="nemotron-labs",
    model_types=("nemotron_labs_diffusion",),
    architecture="NemotronLabsDiffusionModel",
    config_class=nemotron_structprune.StructpruneNemotronConfig,
    model_class=nemotron_structprune.StructpruneNemotron,
    blocks="encoder.layers",
    embedding="encoder.embed_tokens.weight",
    required=(*DREAM.required, "num_key_value_heads", "head_dim", "block_size"),
    sampler="twofold",
    likelihood="fixed_count",
    text_edges="bos",
    published=None,
    supported=COMPUTED
    | UNBIASED
    | {
        "mlp_bias": (False,),
        "tie_word_embeddings": (False,),
        "sliding_window": (None,),
        # how its own code trains; without labels both compute the same
        "dlm_paradigm": ("bidirectional", "block_diff"),
    },
    rope_types=("yarn",),
    ignored=("attn_implementation", "dp_varying_mask_ratio"),
    gguf=None,
    code=tuple(
        Path(nemotron_structprune.__file__).with_name(f"{name}_structprune.py") for name in ("blockwise", "nemotron")
    ),
)
