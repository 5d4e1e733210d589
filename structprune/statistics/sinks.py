"""Attention sinks: incoming mass per position, the soft or hard sink mask, and the keep weights of rows.

Definitions: METHODS.md section 3 of the project, after "Sink-Aware Pruning" (arXiv 2602.17664).
Shapes: B sequences, T positions, H query heads, K key/value heads, D head dim.
"""

import math

import torch

from structprune.config import SinkSettings
from structprune.statistics.policies import policy_weights

# Bytes of one block of scores: on CPU small enough for the cache yet few enough steps for several threads; elsewhere
# large enough to hide the launches.
TILE_BYTES = {"cpu": 4 * 2**20}
DEVICE_TILE_BYTES = 64 * 2**20


@torch.no_grad()
def attention_mass(query: torch.Tensor, key: torch.Tensor, tile: int | None = None) -> torch.Tensor:
    """Attention that each key position receives, summed over heads and queries, in fp32.

    Only a block of scores is in memory at a time, never a whole (T, T) matrix per head: `tile` queries against all keys
    of as many heads, then sequences, as fit `TILE_BYTES`. Two buffers serve all blocks, because fresh memory for each
    would cost as much as the products.

    Args:
        query: (B, H, T, D), after RoPE.
        key: (B, K, T, D), after RoPE; K divides H.
        tile: queries per step; default as many as fit.
    Returns:
        (B, T) fp32; each row sums to H·T.
    """
    batch, heads, length, size = query.shape
    kv_heads = key.shape[1]
    repeat = heads // kv_heads
    tile, span, stack = _block_shape(batch, kv_heads, repeat, length, tile, query.device)
    mass = torch.zeros(batch, length, device=query.device)  # (B, T)
    buffers = torch.empty(2, stack * span * repeat * min(tile, length) * length, device=query.device)
    for row in range(0, batch, stack):
        for head in range(0, kv_heads, span):
            keys = key[row : row + stack, head : head + span].float()  # (b, k, T, D)
            queries = query[row : row + stack, head * repeat : (head + span) * repeat]  # (b, k·r, T, D)
            rows, groups = keys.shape[:2]
            keys = keys.flatten(0, 1).transpose(1, 2)  # (b·k, D, T)
            for start in range(0, length, tile):
                part = queries[:, :, start : start + tile].float() / math.sqrt(size)  # (b, k·r, t, D)
                part = part.reshape(rows * groups, -1, size)  # (b·k, r·t, D): a key head serves r query heads
                shape = (rows * groups, part.shape[1], length)
                scores, weights = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)  # (b·k, r·t, T)
                torch.bmm(part, keys, out=scores)
                torch.softmax(scores, dim=-1, out=weights)
                mass[row : row + stack] += weights.view(rows, -1, length).sum(dim=1)  # (b, T)
    return mass


@torch.no_grad()
def attend_with_mass(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional attention and the mass it gives every key, from one pass over its weights.

    On CPU that is cheaper than `scaled_dot_product_attention` and `attention_mass`, which make the weights twice.

    Args:
        query: (B, H, T, D), after RoPE.
        key, value: (B, K, T, D); K divides H.
    Returns:
        (B, H, T, D) in the query's dtype, and (B, T) fp32.
    """
    batch, heads, length, size = query.shape
    repeat = heads // key.shape[1]
    tile = max(1, min(length, TILE_BYTES["cpu"] // (4 * length)))
    span = max(1, min(heads, TILE_BYTES["cpu"] // (8 * length * tile)))  # scores and weights are both alive
    mixed = torch.empty_like(query, dtype=torch.float32)  # (B, H, T, D)
    mass = torch.zeros(batch, length, device=query.device)  # (B, T)
    for row in range(batch):
        for head in range(0, heads, span):
            shared = slice(head, head + span)
            if repeat > 1:
                shared = torch.arange(head, min(head + span, heads), device=query.device) // repeat  # (h,)
            keys, values = key[row, shared].float(), value[row, shared].float()  # (h, T, D)
            queries = query[row, head : head + span].float() / math.sqrt(size)  # (h, T, D)
            for start in range(0, length, tile):
                weights = torch.softmax(queries[:, start : start + tile] @ keys.transpose(1, 2), dim=-1)  # (h, t, T)
                mass[row] += weights.sum((0, 1))  # (T,)
                mixed[row, head : head + span, start : start + tile] = weights @ values  # (h, t, D)
    return mixed.to(query.dtype), mass


def _block_shape(batch: int, kv_heads: int, repeat: int, length: int, tile: int | None, device) -> tuple[int, int, int]:
    """Queries, key heads and sequences per step: more heads only where whole sequences of one fit, and so on."""
    rows = TILE_BYTES.get(device.type, DEVICE_TILE_BYTES) // (4 * length)  # of scores, that fit
    tile = tile or max(1, min(length, rows // repeat))
    span = max(1, min(kv_heads, rows // (repeat * tile)))
    stack = max(1, min(batch, rows // (repeat * tile * kv_heads)))
    return tile, span, stack


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


def sink_phi(mass: torch.Tensor, sink: SinkSettings) -> torch.Tensor:
    """φ by the settings: `sink_mask` (`soft`), or 1 above the threshold, else 0 (`hard`): (..., T) -> (..., T)."""
    if sink.mask == "hard":
        return (~(mass <= sink_threshold(mass, sink.kappa))).to(mass.dtype)
    return sink_mask(mass, sink.alpha, sink.kappa, sink.scale_free)


def keep_weights(mass: torch.Tensor, sink: SinkSettings) -> torch.Tensor:
    """Weight ω of every row by the settings' policy: (..., S, T) of all levels of a window -> (..., S, T).

    Under `all` and `none` a row's weight hangs on no other level, so (..., T) will do.
    """
    return policy_weights(sink_phi(mass, sink), sink.policy)
