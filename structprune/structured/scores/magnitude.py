"""Group magnitude: the L2 norm over all of a unit's coupled weight slices."""

import torch


def magnitude_scores(slices: list[torch.Tensor]) -> torch.Tensor:
    """‖unit‖₂ over every coupled slice: U units, slices (U, n_i) -> (U,)."""
    return sum(part.float().pow(2).sum(1) for part in slices).sqrt()
