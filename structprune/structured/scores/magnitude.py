"""Group magnitude: the L2 norm over all of a unit's coupled weight slices."""

from functools import reduce

import torch

from structprune.config import StructuredSettings
from structprune.structured.paths import RemovalPath, static_path
from structprune.structured.units import Units


def magnitude_scores(slices: list[torch.Tensor]) -> torch.Tensor:
    """‖unit‖₂ over every coupled slice: U units, slices (U, n_i) -> (U,)."""
    return reduce(torch.add, (part.float().pow(2).sum(1) for part in slices)).sqrt()


def path(units: Units, slices: list[torch.Tensor], settings: StructuredSettings) -> RemovalPath:
    """The smallest units first; a step costs its squared norm."""
    return static_path(magnitude_scores(slices) ** 2, units.groups)
