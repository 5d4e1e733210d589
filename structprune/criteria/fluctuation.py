"""FLAP's fluctuation metric (arXiv 2312.11983): what is lost when a unit is replaced by its mean."""

import torch

from structprune.criteria.paths import per_unit


def fluctuation_scores(weight: torch.Tensor, variance: torch.Tensor, width: int) -> torch.Tensor:
    """Mean over a unit's columns of Var(x_c) · ‖W[:, c]‖².

    Args:
        weight: (O, C) of the consumer, C = U * width.
        variance: (C,) weighted variance of its input features.
    Returns:
        (U,) fp64.
    """
    return per_unit(weight.double().pow(2).sum(0) * variance, width) / width


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """z-scores over the units of one block and kind, which FLAP ranks globally as they are: (U,) -> (U,)."""
    deviation = scores.std(correction=0)  # ()
    return (scores - scores.mean()) / deviation.clamp(min=torch.finfo(scores.dtype).tiny)
