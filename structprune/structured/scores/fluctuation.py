"""FLAP's fluctuation metric (arXiv 2312.11983): the loss when a unit is replaced by its mean."""

import torch

from structprune.config import StructuredSettings
from structprune.statistics.activations import Moments
from structprune.structured.paths import RemovalPath, per_unit, static_path
from structprune.structured.units import Units


def fluctuation_scores(weight: torch.Tensor, variance: torch.Tensor, width: int) -> torch.Tensor:
    """Mean over a unit's columns of Var(x_c) · ‖W[:, c]‖².

    Args:
        weight: (O, C) of the consumer, C = U * width.
        variance: (C,) weighted variance of its input features.
    Returns:
        (U,) fp64.
    """
    return per_unit(_columns(weight, variance), width) / width


def fluctuation_ranks(weight: torch.Tensor, variance: torch.Tensor, width: int) -> torch.Tensor:
    """As `fluctuation_scores`, of the columns' z-scores within the block and kind, which FLAP ranks globally."""
    columns = _columns(weight, variance)  # (C,)
    deviation = columns.std(correction=0)  # ()
    standardised = (columns - columns.mean()) / deviation.clamp(min=torch.finfo(columns.dtype).tiny)  # (C,)
    return per_unit(standardised, width) / width


def _columns(weight: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Var(x_c) · ‖W[:, c]‖²: (O, C), (C,) -> (C,) fp64."""
    return weight.double().pow(2).sum(0) * variance


def path(units: Units, moments: Moments, settings: StructuredSettings) -> RemovalPath:
    """The lowest fluctuation first; under `global` allocation z-scores are compared."""
    weight = units.weight.to(moments.mean.device)  # (O, C)
    scores = fluctuation_scores(weight, moments.variance, units.width)  # (U,)
    ranks = fluctuation_ranks(weight, moments.variance, units.width)  # (U,)
    return static_path(scores * units.width, units.groups, ranks)
