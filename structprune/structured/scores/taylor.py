"""First-order Taylor importance of coupled slices (LLM-Pruner, arXiv 2305.11627)."""

from functools import reduce

import torch

from structprune.config import StructuredSettings
from structprune.structured.paths import RemovalPath, static_path
from structprune.structured.units import Units


def taylor_scores(products: list[torch.Tensor]) -> torch.Tensor:
    """Σ |g · w| over every coupled slice: U units, elementwise products (U, n_i) -> (U,)."""
    return reduce(torch.add, (part.float().abs().sum(1) for part in products))


def path(units: Units, products: list[torch.Tensor], settings: StructuredSettings) -> RemovalPath:
    """The least important units first."""
    return static_path(taylor_scores(products), units.groups)
