"""Magnitude: the score that looks at weights alone."""

import torch


def magnitude_scores(weight: torch.Tensor) -> torch.Tensor:
    """|W|: (O, C) -> (O, C) fp32."""
    return weight.float().abs()
