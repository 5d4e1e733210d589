"""RIA: a weight's share of its row and of its column, times the root of its input's norm.

"Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024.
"""

import torch


def ria_scores(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """(|W| / Σ_row |W| + |W| / Σ_col |W|) · ‖X̃‖^½: weight (O, C), norm (C,) -> (O, C) fp32.

    A weight counts relative to all inputs of its output and to all outputs of its input, so that no whole row or
    column is emptied.
    """
    size = weight.float().abs()  # (O, C)
    tiny = torch.finfo(torch.float32).tiny  # of rows and columns that are all zero
    rows, columns = (size.sum(side, keepdim=True).clamp(min=tiny) for side in (1, 0))  # (O, 1), (1, C)
    return (size / rows + size / columns) * norm.float().sqrt()
