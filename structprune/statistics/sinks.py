"""Attention sinks: incoming mass per position, the soft or hard sink mask, and the keep weights of rows.

Definitions: docs/methods.md section 3 of the project, after "Sink-Aware Pruning" (arXiv 2602.17664).
Shapes: B sequences, T positions, H query heads, K key/value heads, D head dim.
"""

import math
from functools import partial

import torch

from structprune.config import SinkSettings
from structprune.statistics.policies import policy_weights

# Bytes of one block of scores: on CPU small enough for the cache yet few enough steps for several threads; elsewhere
# large enough to hide the launches.
TILE_BYTES = {"cpu": 4 * 2**20}
DEVICE_TILE_BYTES = 64 * 2**20


@torch.no_grad()
def attention_mass(query: torch.Tensor, key: torch.Tensor, tile: int | None = None) -> torch.Tensor:
    """`head_mass` summed over heads: (B, H, T, D), (B, K, T, D) -> (B, T) fp32; each row sums to H·T."""
    return head_mass(query, key, tile).sum(1)


@torch.no_grad()
def head_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    tile: int | None = None,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attention that each key position receives from every head, summed over queries, in fp32.

    Only a block of scores is in memory at a time, never a whole (T, T) matrix per head: `tile` queries against all keys
    of as many heads, then sequences, as fit `TILE_BYTES`. All blocks share two buffers, because allocating new ones
    would cost as much as the products.

    Args:
        query: (B, H, Q, D), after RoPE; where Q < T they are the last Q of the T positions.
        key: (B, K, T, D), after RoPE; K divides H.
        tile: queries per step; default: as many as fit.
        scale: of the scores; default 1/√D.
        mask: (B or 1, H or 1, Q or 1, T), true where a query sees a key, or numbers that are added to the scores.
        causal: a query sees no later position.
    Returns:
        (B, H, T) fp32; each row sums to Q.
    """
    batch, heads, count, size = query.shape
    kv_heads, length = key.shape[1:3]
    repeat = heads // kv_heads
    tile, span, stack = _block_shape(batch, kv_heads, repeat, length, tile, query.device)
    tile = min(tile, count)
    scale = 1 / math.sqrt(size) if scale is None else scale
    mass = torch.empty(batch, heads, length, device=query.device)  # (B, H, T)
    buffers = torch.empty(2, stack * span * repeat * tile * length, device=query.device)
    for row in range(0, batch, stack):
        for head in range(0, kv_heads, span):
            rows, sharing = slice(row, row + stack), slice(head * repeat, (head + span) * repeat)
            keys = key[rows, head : head + span]  # (b, k, T, D)
            hide = partial(_hide, mask, causal, (rows, sharing), length - count)
            mass[rows, sharing] = _group_mass(query[rows, sharing].float() * scale, keys, tile, buffers, hide)
    return mass


def _group_mass(query: torch.Tensor, key: torch.Tensor, tile: int, buffers: torch.Tensor, hide) -> torch.Tensor:
    """`head_mass` of the heads and sequences of one block: scaled (b, k·r, Q, D), (b, k, T, D) -> (b, k·r, T)."""
    rows, groups, length, size = key.shape
    heads, count = query.shape[1:3]
    key = key.float().flatten(0, 1).transpose(1, 2)  # (b·k, D, T)
    total = torch.zeros(rows, heads, length, device=query.device)  # (b, k·r, T)
    for start in range(0, count, tile):
        part = query[:, :, start : start + tile].reshape(rows * groups, -1, size)  # (b·k, r·q, D): r queries a key head
        shape = (rows * groups, part.shape[1], length)
        scores, weights = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)  # (b·k, r·q, T)
        torch.bmm(part, key, out=scores)
        hide(scores.view(rows, heads, -1, length), start)
        torch.softmax(scores, dim=-1, out=weights)
        total += weights.view(rows, heads, -1, length).sum(dim=2)  # (b, k·r, T)
    return total


def _hide(mask: torch.Tensor | None, causal: bool, place: tuple, offset: int, scores: torch.Tensor, start: int) -> None:
    """Mask, in place, the scores (b, h, q, T) of keys that a block's queries do not see, as `head_mass` says.

    Args:
        place: the block's sequences and heads, slices of all. start: its first query.
        offset: position of the first query of all.
    """
    if mask is not None:
        sides = (*place, slice(start, start + scores.shape[2]))
        part = mask[tuple(slice(None) if size == 1 else side for size, side in zip(mask.shape, sides))]  # (b, h, q, T)
        scores.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else scores.add_(part)
    if causal:
        keys = torch.arange(scores.shape[3], device=scores.device)  # (T,)
        queries = offset + start + torch.arange(scores.shape[2], device=scores.device)  # (q,)
        scores.masked_fill_(keys > queries[:, None], -torch.inf)


@torch.no_grad()
def attend_with_mass(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional attention and the mass each head gives every key, from one pass over its weights.

    On CPU this is cheaper than `scaled_dot_product_attention` plus `head_mass`, which compute the weights twice.

    Args:
        query: (B, H, T, D), after RoPE.
        key, value: (B, K, T, D); K divides H.
    Returns:
        (B, H, T, D) in the query's dtype, and (B, H, T) fp32.
    """
    batch, heads, length, size = query.shape
    repeat = heads // key.shape[1]
    tile = max(1, min(length, TILE_BYTES["cpu"] // (4 * length)))
    span = max(1, min(heads, TILE_BYTES["cpu"] // (8 * length * tile)))  # scores and weights are both alive
    mixed = torch.empty_like(query, dtype=torch.float32)  # (B, H, T, D)
    mass = torch.zeros(batch, heads, length, device=query.device)  # (B, H, T)
    for row in range(batch):
        for head in range(0, heads, span):
            shared: slice | torch.Tensor = slice(head, head + span)
            if repeat > 1:
                shared = torch.arange(head, min(head + span, heads), device=query.device) // repeat  # (h,)
            keys, values = key[row, shared].float(), value[row, shared].float()  # (h, T, D)
            queries = query[row, head : head + span].float() / math.sqrt(size)  # (h, T, D)
            for start in range(0, length, tile):
                weights = torch.softmax(queries[:, start : start + tile] @ keys.transpose(1, 2), dim=-1)  # (h, t, T)
                mass[row, head : head + span] += weights.sum(1)  # (h, T)
                mixed[row, head : head + span, start : start + tile] = weights @ values  # (h, t, D)
    return mixed.to(query.dtype), mass


def even_mass(mask: torch.Tensor) -> torch.Tensor:
    """Mass of every key if each query attended evenly to the keys it sees: (B, 1, T, T) bool -> (B, 1, T) fp32.

    1 where every query sees every key. A key that few see, or only queries with many keys, gets less, and would be a
    sink less often by its place alone. A key that no query sees has the smallest positive number.
    """
    seen = mask.float()  # (B, 1, T, T)
    shares = seen / seen.sum(-1, keepdim=True).clamp(min=1)  # (B, 1, T, T)
    return shares.sum(-2).clamp(min=torch.finfo(torch.float32).tiny)


def _block_shape(batch: int, kv_heads: int, repeat: int, length: int, tile: int | None, device) -> tuple[int, int, int]:
    """Queries, key heads and sequences per step: several heads only where one whole sequence fits, then several
    sequences only where all heads fit."""
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

    Under `all` and `none` a row's weight depends on no other level, so (..., T) works too.
    """
    return policy_weights(sink_phi(mass, sink), sink.policy)
