"""Structured Wanda: weight times activation over the columns that read a unit (after arXiv 2306.11695)."""

import torch

from structprune.structured.paths import per_unit


def wanda_scores(weight: torch.Tensor, squared_norm: torch.Tensor, width: int) -> torch.Tensor:
    """Σ_c ‖W[:, c]‖² · ‖X̃[:, c]‖² over a unit's columns.

    Args:
        weight: (O, C) of the consumer, C = U * width.
        squared_norm: (C,) Σ (ω x)² of its input features.
    Returns:
        (U,) fp64.
    """
    return per_unit(weight.double().pow(2).sum(0) * squared_norm, width)
