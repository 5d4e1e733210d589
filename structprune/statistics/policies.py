"""Which sink rows lose weight: policies over the S noise levels of a window, and the effect of each.

The published claim is that sinks which move while the model denoises are transient and can be ignored, while sinks
that stay cannot (arXiv 2602.17664; the formula is ours, docs/methods.md section 3). Pure functions of the sink mask φ.
Shapes: N windows, S noise levels, T positions.
"""

import torch

from structprune.config import SinkPolicy

SINK = 0.5  # a position is a sink of a level where φ exceeds this
DECILES = 10
TOP = 10  # positions that lost most, to report


def instability(phi: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """Population variance of φ over the levels, 0 (always, or never, a sink) to 1/4: (..., S, T) -> (..., T).

    Args:
        present: (S, T) bool, the levels that count for a position; default all. Without any the result is NaN.
    """
    if present is None:
        return phi.var(-2, correction=0)
    phi = phi.masked_fill(~present, torch.nan)  # (..., S, T)
    return ((phi - phi.nanmean(-2, keepdim=True)) ** 2).nanmean(-2)


def survival(phi: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """Share of the levels at which a position is a sink, φ > 1/2: (..., S, T) -> (..., T), as `instability`."""
    sink = (phi > SINK).to(phi.dtype)  # (..., S, T)
    return sink.mean(-2) if present is None else sink.masked_fill(~present, torch.nan).nanmean(-2)


def policy_weights(phi: torch.Tensor, policy: SinkPolicy) -> torch.Tensor:
    """Keep weight ω of every row of S levels by a policy: (..., S, T) -> (..., S, T).

    `all`: 1 - φ, also for (..., T). `unstable`: 1 - φ · min(1, 4 · Var_s φ), so that a sink at all levels keeps its
    weight and a sink at half of them loses as much as under `all`. `none`: 1.
    """
    if policy == "none":
        return torch.ones_like(phi)
    if policy == "unstable":
        phi = phi * (4 * instability(phi)).clamp(max=1)[..., None, :]  # (..., S, T)
    return 1 - phi


def removed_weight(weights: torch.Tensor, masked: torch.Tensor) -> dict:
    """How much weight ω (N, S, T) was removed, and from which positions, as shares of a row's full weight of 1.

    Args:
        masked: (N, S, T) bool, rows that are mask tokens.
    Returns:
        `share` over all rows; `by_level` (S); `by_decile` of the position in the window (10, or T where that is less);
        `by_kind`: of `mask` tokens and of `text`, None without any; `of_mask`: the part of all removed weight that was
        removed from mask tokens (None: nothing removed); `top`: the positions that lost most, and their share.
    """
    lost = 1 - weights.double()  # (N, S, T)
    by_position = lost.mean((0, 1))  # (T,)
    top = by_position.topk(min(TOP, len(by_position)))
    total, at_masks = float(lost.sum()), float(lost[masked].sum())
    return {
        "share": float(lost.mean()),
        "by_level": lost.mean((0, 2)).tolist(),
        "by_decile": [float(part.mean()) for part in by_position.tensor_split(min(DECILES, len(by_position)))],
        "by_kind": {"mask": _mean(lost[masked]), "text": _mean(lost[~masked])},
        "of_mask": at_masks / total if total > 0 else None,
        "top": [[int(place), float(share)] for share, place in zip(*top) if share > 0],
    }


def _mean(values: torch.Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None


def policy_report(phi: torch.Tensor, masked: torch.Tensor, policy: SinkPolicy) -> dict:
    """The effect of a policy on some windows beside that of `all` and `unstable`, as plain data; `masked` as above.

    Args:
        phi: (N, S, T) sink mask, levels in display order.
    Returns:
        `policy`; `sinks`: share of rows with φ > 1/2; `survival`: mean share of levels at which a position is a sink,
        of those that ever are, and `instability` their mean variance (None without any, or with one level); `taken`:
        policy -> `removed_weight`.
    """
    lasting = survival(phi)  # (N, T)
    ever = lasting > 0  # (N, T)
    policies: tuple[SinkPolicy, ...] = ("all",) if phi.shape[1] < 2 else ("all", "unstable")
    return {
        "policy": policy,
        "windows": phi.shape[0],
        "sinks": float((phi > SINK).double().mean()),
        "survival": _mean(lasting[ever]),
        "instability": _mean(instability(phi)[ever]) if phi.shape[1] > 1 else None,
        "taken": {name: removed_weight(policy_weights(phi, name), masked) for name in policies},
    }
