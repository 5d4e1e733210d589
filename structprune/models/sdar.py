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
    sampler="aligned",
    rope_types=("default",),
    code=tuple(
        Path(sdar_structprune.__file__).with_name(f"{name}_structprune.py") for name in ("a2d", "blockwise", "sdar")
    ),
)
