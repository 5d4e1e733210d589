"""Magnitude: the score of weights alone."""

import torch


def magnitude_scores(weight: torch.Tensor, statistic: None = None) -> torch.Tensor:
    """|W|: (O, C) -> (O, C) fp32."""
    return weight.float().abs()
