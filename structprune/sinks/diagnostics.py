"""How concentrated sinks are, and how much they move over a trajectory: pure functions (docs/methods.md section 3).

Definitions after "Sink-Aware Pruning" (arXiv 2602.17664) and "Attention Sinks in Diffusion Language Models" (arXiv
2510.15731). Shapes: S steps (noise levels), T positions, `...` any leading dimensions; φ is the soft mask of
`sink_mask`. All variances are population variances. NaN marks undefined values.
"""

import torch

from structprune.statistics.policies import SINK

EPSILON = 3.0  # threshold for the sinks of one head, in attention summed over queries: an even share is 1


def spatial_variance(mass: torch.Tensor) -> torch.Tensor:
    """Variance over positions of the mean mass over steps, in units of mass²: (..., S, T) -> (...)."""
    return mass.mean(-2).var(-1, correction=0)


def centroids(phi: torch.Tensor) -> torch.Tensor:
    """φ-weighted mean position of every step, NaN where no position is a sink: (..., S, T) -> (..., S)."""
    positions = torch.arange(phi.shape[-1], device=phi.device, dtype=phi.dtype)  # (T,)
    centre = (phi * positions).sum(-1) / phi.sum(-1)  # (..., S)
    return centre.masked_fill(~(phi > SINK).any(-1), torch.nan)


def spreads(phi: torch.Tensor) -> torch.Tensor:
    """φ-weighted standard deviation around the centroid, NaN where there is none: (..., S, T) -> (..., S)."""
    positions = torch.arange(phi.shape[-1], device=phi.device, dtype=phi.dtype)  # (T,)
    distance = positions - centroids(phi)[..., None]  # (..., S, T)
    return ((phi * distance**2).sum(-1) / phi.sum(-1)).sqrt()


def temporal_variance(phi: torch.Tensor) -> torch.Tensor:
    """Variance of the centroid over the steps with a sink, in positions²: (..., S, T) -> (...).

    NaN where fewer than two steps have a sink.
    """
    centre = centroids(phi)  # (..., S)
    count = (~centre.isnan()).sum(-1)  # (...)
    distance = centre - centre.nanmean(-1, keepdim=True)  # (..., S)
    return ((distance**2).nansum(-1) / count).masked_fill(count < 2, torch.nan)


def retention(phi: torch.Tensor) -> torch.Tensor:
    """Share of a step's sinks that are still sinks at the next step, NaN without sinks: (..., S, T) -> (..., S - 1)."""
    sink = phi > SINK  # (..., S, T)
    both, before = (sink[..., 1:, :] & sink[..., :-1, :]).sum(-1), sink[..., :-1, :].sum(-1)  # 2 x (..., S - 1)
    return (both / before).masked_fill(before == 0, torch.nan)


def head_sinks(mass: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """Whether a position's incoming attention exceeds the mean of the others by more than `epsilon`: (..., T) -> bool.

    Args:
        mass: incoming attention of one head, summed over its queries.
    """
    others = (mass.sum(-1, keepdim=True) - mass) / (mass.shape[-1] - 1)  # (..., T)
    return mass - others > epsilon


def per_query(mass: torch.Tensor) -> torch.Tensor:
    """Mass per query that can see the position in a causal model, with the total unchanged: (..., T) -> (..., T).

    Position j is visible to T - j queries. The total stays, so that thresholds mean the same as in a bidirectional
    model, where every position is visible to T queries.
    """
    queries = torch.arange(mass.shape[-1], 0, -1, device=mass.device, dtype=mass.dtype)  # (T,)
    rate = mass / queries  # (..., T)
    return rate * (mass.sum(-1, keepdim=True) / rate.sum(-1, keepdim=True))
