"""Attention sinks: incoming mass per position, the soft or hard sink mask, and the keep weights of rows.

Definitions: METHODS.md section 3 of the project, after "Sink-Aware Pruning" (arXiv 2602.17664).
Shapes: B sequences, T positions, H query heads, K key/value heads, D head dim.
"""

import math

import torch

from structprune.config import SinkSettings

TILE_BYTES = 8 * 2**20  # of one block of scores: small enough to stay in cache, large enough to keep matmuls busy


def attention_mass(query: torch.Tensor, key: torch.Tensor, tile: int | None = None) -> torch.Tensor:
    """Attention that each key position receives, summed over heads and queries, in fp32.

    Only `tile` query rows of one sequence are in memory at a time, never a whole (T, T) matrix.

    Args:
        query: (B, H, T, D), after RoPE.
        key: (B, K, T, D), after RoPE; K divides H.
        tile: query rows per step; default as many as fit `TILE_BYTES`.
    Returns:
        (B, T) fp32; each row sums to H·T.
    """
    batch, heads, length, size = query.shape
    repeat = heads // key.shape[1]
    tile = tile or max(1, min(length, TILE_BYTES // (4 * heads * length)))
    mass = torch.zeros(batch, length, device=query.device)  # (B, T)
    scale = 1 / math.sqrt(size)
    for row in range(batch):
        keys = key[row].float().repeat_interleave(repeat, dim=0).transpose(1, 2)  # (H, D, T)
        for start in range(0, length, tile):
            queries = query[row, :, start : start + tile].float() * scale  # (H, tile, D)
            mass[row] += torch.softmax(queries @ keys, dim=-1).sum(dim=(0, 1))  # (H, tile, T) -> (T,)
    return mass


def sink_threshold(mass: torch.Tensor, kappa: float) -> torch.Tensor:
    """mean + kappa · population std over positions: (..., T) -> (..., 1)."""
    return mass.mean(-1, keepdim=True) + kappa * mass.std(-1, correction=0, keepdim=True)


def sink_mask(mass: torch.Tensor, alpha: float = 5.0, kappa: float = 2.0, scale_free: bool = False) -> torch.Tensor:
    """Soft sink mask φ = sigmoid(alpha · (m - threshold)): (..., T) -> (..., T) in (0, 1).

    `scale_free` divides the mass by its mean over positions first, so that φ does not harden with heads x layers.
    """
    if scale_free:
        mass = mass / mass.mean(-1, keepdim=True)  # (..., T)
    return torch.sigmoid(alpha * (mass - sink_threshold(mass, kappa)))


def keep_weights(mass: torch.Tensor, sink: SinkSettings) -> torch.Tensor:
    """Weight ω of every row: 1 - φ (`soft`) or 0 above the threshold (`hard`): (..., T) -> (..., T)."""
    if sink.mask == "hard":
        return (mass <= sink_threshold(mass, sink.kappa)).to(mass.dtype)
    return 1 - sink_mask(mass, sink.alpha, sink.kappa, sink.scale_free)
