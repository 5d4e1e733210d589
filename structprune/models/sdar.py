"""SDAR (arXiv 2510.06303): Qwen3's shape, trained to fill blocks from left to right, each after clean text."""

from dataclasses import replace
from pathlib import Path

from structprune.models import sdar_structprune
from structprune.models.a2d import A2D_QWEN3

SDAR = replace(
    A2D_QWEN3,
    name="sdar",
    model_types=("sdar",),
    architecture="SDARForCausalLM",
    config_class=sdar_structprune.StructpruneSDARConfig,
    model_class=sdar_structprune.StructpruneSDAR,
    required=(*A2D_QWEN3.required, "block_size"),  # where it is absent, blocks may be of 4, 32 or 64 tokens
    sampler="aligned",
    rope_types=("default",),
    # of its own training, and how its own code computes attention
    ignored=(
        "attn_implementation",
        "debug",
        "ep_size",
        "fuse_cross_entropy",
        "micro_forward",
        "skip_checkpoint",
        "use_deepep",
    ),
    code=tuple(
        Path(sdar_structprune.__file__).with_name(f"{name}_structprune.py") for name in ("a2d", "blockwise", "sdar")
    ),
)
