"""Structured Wanda: weight times activation over the columns that read a unit (after arXiv 2306.11695)."""

import torch

from structprune.config import StructuredSettings
from structprune.statistics.activations import Moments
from structprune.structured.paths import RemovalPath, per_unit, static_path
from structprune.structured.units import Units


def wanda_scores(weight: torch.Tensor, squared_norm: torch.Tensor, width: int) -> torch.Tensor:
    """Σ_c ‖W[:, c]‖² · ‖X̃[:, c]‖² over a unit's columns.

    Args:
        weight: (O, C) of the consumer, C = U * width.
        squared_norm: (C,) Σ (ω x)² of its input features.
    Returns:
        (U,) fp64.
    """
    return per_unit(weight.double().pow(2).sum(0) * squared_norm, width)


def path(units: Units, moments: Moments, settings: StructuredSettings) -> RemovalPath:
    """The lowest scores first."""
    weight = units.weight.to(moments.mean.device)  # (O, C)
    return static_path(wanda_scores(weight, moments.squared_norm, units.width), units.groups)
