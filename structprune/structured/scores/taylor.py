"""First-order Taylor importance of coupled slices (LLM-Pruner, arXiv 2305.11627)."""

import torch


def taylor_scores(products: list[torch.Tensor]) -> torch.Tensor:
    """Σ |g · w| over every coupled slice: U units, elementwise products (U, n_i) -> (U,)."""
    return sum(part.float().abs().sum(1) for part in products)
