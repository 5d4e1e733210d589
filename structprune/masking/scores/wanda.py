"""Wanda: weight times the norm of its input (arXiv 2306.11695)."""

import torch


def wanda_scores(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """|W[o, c]| · ‖X̃[:, c]‖: weight (O, C), norm (C,) -> (O, C) fp32."""
    return weight.float().abs() * norm.float()
