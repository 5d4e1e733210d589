"""Attention mass by FlexAttention: two fused passes in plain torch, with nothing of size (T, T) in memory.

The mass of key j in one head is Σ_i exp(s_ij - lse_i), lse_i being the log-sum-exp of query i's scores, which attention
computes anyway. Its logarithm is again a log-sum-exp, over the queries: the one that attention computes when queries
and keys are exchanged and lse_i is subtracted from the scores. So the second pass is FlexAttention too, without a
hand-written kernel. Not measured on a GPU yet; everything uses the reference, `sinks.attention_mass`.
Shapes: B sequences, T positions, H query heads, K key/value heads, D head dim.
"""

import warnings
from functools import lru_cache

import torch
from torch.nn.attention import flex_attention as flex


@torch.no_grad()
def attend_with_flex_mass(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional attention and the mass it gives every key, summed over heads and queries.

    Args:
        query: (B, H, T, D), after RoPE.
        key, value: (B, K, T, D); K divides H.
    Returns:
        (B, H, T, D) in the query's dtype, and (B, T) fp32.
    """
    attend, grouped = _attention(query.device.type), key.shape[1] != query.shape[1]
    mixed, lse = _with_lse(attend, query, key, value, grouped, None)  # (B, H, T, D), (B, H, T)

    def centred(score, batch, head, own, other):  # own: a key, as the query of this pass; other: a query
        return score - lse[batch, head, other]

    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # (B, H, T, D)
    _, log_mass = _with_lse(attend, keys, query, query, False, centred)  # (B, H, T)
    return mixed, log_mass.float().exp().sum(1)  # (B, T)


def _with_lse(attend, query, key, value, grouped: bool, change) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) and log-sum-exp (B, H, T) of FlexAttention, by the interface of the installed torch."""
    options = {"score_mod": change, "enable_gqa": grouped}
    if hasattr(flex, "AuxRequest"):  # from torch 2.9
        mixed, aux = attend(query, key, value, **options, return_aux=flex.AuxRequest(lse=True))
        return mixed, aux.lse
    return attend(query, key, value, **options, return_lse=True)


@lru_cache
def _attention(device: str):
    """FlexAttention, compiled on accelerators; on CPU it runs unfused, for tests only."""
    if device != "cpu":
        return torch.compile(flex.flex_attention, dynamic=True)
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile", category=UserWarning)
    return flex.flex_attention
