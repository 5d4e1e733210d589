"""Positions of tokens and rotary position embeddings.

Copied next to every checkpoint structprune writes: imports torch only.

Shapes: B batch, T sequence length, H heads, D head dim.
Papers: RoPE arXiv 2104.09864, its frequencies in Llama 3.1 arXiv 2407.21783.
"""

import math
from typing import Any

import torch

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def check_positions(position_ids, shape) -> None:
    """Raise ValueError if positions are not integers (B, T) or (1, T); `shape` is B and T."""
    batch, length = shape
    if tuple(position_ids.shape) not in ((batch, length), (1, length)) or position_ids.is_floating_point():
        given = f"{tuple(position_ids.shape)} {position_ids.dtype}"
        raise ValueError(f"position_ids must be ({batch}, {length}) or (1, {length}) integers, not {given}")


def positions_of(length: int, device, real=None, position_ids=None):
    """`position_ids`; else positions 0.., (1, T), or those among each row's real tokens, true or 1 in `real` (B, T)."""
    if position_ids is not None:
        return position_ids  # (B or 1, T)
    if real is not None:
        return (real.long().cumsum(-1) - 1).clamp(min=0)  # (B, T)
    return torch.arange(length, device=device)[None]  # (1, T)


def rotary_tables(positions, head_dim: int, theta: float, scaling: Any = None):
    """Cosines and sines of RoPE in fp32: positions (B, T) -> two (B, 1, T, D).

    `scaling`: see `scaled_frequencies`; or a function of the frequencies, (D/2,) -> (D/2,).
    """
    powers = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim  # (D/2,)
    # 1 / theta^p, not theta^-p: rounded as the checkpoints were trained, 3e-5 rad apart at position 512
    frequencies = 1.0 / theta**powers  # (D/2,)
    if scaling is not None:
        frequencies = scaling(frequencies) if callable(scaling) else scaled_frequencies(frequencies, scaling)  # (D/2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, D)
    return angles.cos(), angles.sin()


def scaled_frequencies(frequencies, scaling: dict):
    """RoPE's frequencies for longer texts than were trained on, as Llama 3.1 has them: (D/2,) -> (D/2,).

    A frequency that turns more than `high_freq_factor` times in `original_max_position_embeddings` positions stays, one
    that turns less than `low_freq_factor` times is divided by `factor`, and those between are mixed linearly of both.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # in the order of transformers, so that rounding is the same
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)  # (D/2,)
    share = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2,) of the frequency as it was
    return (1 - share) * frequencies / scaling["factor"] + share * frequencies


def rotate(x, cos, sin, scale=None):
    """Rotate-half RoPE in fp32, times `scale` (B, 1, T, 1): (B, H, T, D) -> (B, H, T, D) in x's dtype.

    Where the tables have fewer features, only the first ones turn.
    """
    size = cos.shape[-1]
    wide = x[..., :size].float()  # (B, H, T, size)
    turned = torch.cat((-wide[..., size // 2 :], wide[..., : size // 2]), dim=-1)  # (B, H, T, size)
    result = (wide * cos + turned * sin).to(x.dtype)  # (B, H, T, size)
    if size < x.shape[-1]:
        result = torch.cat((result, x[..., size:]), dim=-1)  # (B, H, T, D)
    return result if scale is None else result * scale.to(x.dtype)
