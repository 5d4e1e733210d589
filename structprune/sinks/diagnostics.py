"""How concentrated sinks are, and how much they move over a trajectory: pure functions (docs/methods.md section 3).

Definitions after "Sink-Aware Pruning" (arXiv 2602.17664) and "Attention Sinks in Diffusion Language Models" (arXiv
2510.15731). Shapes: S steps (noise levels), T positions, `...` any leading ones; φ is `sink_mask`'s. All variances are
population variances. NaN marks what cannot be told.
"""

import torch

from structprune.statistics.policies import SINK

EPSILON = 3.0  # of the sinks of one head, in attention summed over queries: 1 is an even share


def spatial_variance(mass: torch.Tensor) -> torch.Tensor:
    """Variance over positions of the mean mass over steps, in units of mass²: (..., S, T) -> (...)."""
    return mass.mean(-2).var(-1, correction=0)


def centroids(phi: torch.Tensor) -> torch.Tensor:
    """φ-weighted mean position of every step, NaN where no position is a sink: (..., S, T) -> (..., S)."""
    place = torch.arange(phi.shape[-1], device=phi.device, dtype=phi.dtype)  # (T,)
    centre = (phi * place).sum(-1) / phi.sum(-1)  # (..., S)
    return centre.masked_fill(~(phi > SINK).any(-1), torch.nan)


def spreads(phi: torch.Tensor) -> torch.Tensor:
    """φ-weighted standard deviation of the position around the centroid, NaN as there: (..., S, T) -> (..., S)."""
    place = torch.arange(phi.shape[-1], device=phi.device, dtype=phi.dtype)  # (T,)
    away = place - centroids(phi)[..., None]  # (..., S, T)
    return ((phi * away**2).sum(-1) / phi.sum(-1)).sqrt()


def temporal_variance(phi: torch.Tensor) -> torch.Tensor:
    """Variance of the centroid over the steps that have one, in positions²: (..., S, T) -> (...).

    NaN where fewer than two steps have a sink.
    """
    centre = centroids(phi)  # (..., S)
    known = ~centre.isnan()
    count = known.sum(-1)  # (...)
    away = centre - centre.nanmean(-1, keepdim=True)  # (..., S)
    return ((away**2).nansum(-1) / count).masked_fill(count < 2, torch.nan)


def kept(phi: torch.Tensor) -> torch.Tensor:
    """Share of a step's sinks that are sinks of the next step too, NaN for none: (..., S, T) -> (..., S - 1)."""
    sink = phi > SINK  # (..., S, T)
    both, before = (sink[..., 1:, :] & sink[..., :-1, :]).sum(-1), sink[..., :-1, :].sum(-1)  # 2 x (..., S - 1)
    return (both / before).masked_fill(before == 0, torch.nan)


def head_sinks(mass: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """Whether a position's incoming attention exceeds the mean of the others by more than `epsilon`: (..., T) -> bool.

    Args:
        mass: of one head, summed over its queries.
    """
    others = (mass.sum(-1, keepdim=True) - mass) / (mass.shape[-1] - 1)  # (..., T)
    return mass - others > epsilon


def per_query(mass: torch.Tensor) -> torch.Tensor:
    """Mass per query that sees the position in a causal model, at the same total: (..., T) -> (..., T).

    Position j is seen by T - j queries. The total is kept so that thresholds mean what they mean in a bidirectional
    model, where every position is seen by T.
    """
    seen = torch.arange(mass.shape[-1], 0, -1, device=mass.device, dtype=mass.dtype)  # (T,)
    rate = mass / seen  # (..., T)
    return rate * (mass.sum(-1, keepdim=True) / rate.sum(-1, keepdim=True))
