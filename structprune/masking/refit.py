"""Closed-form refit of the kept weights on a fixed mask, in delta form (METHODS.md section 5, row by row).

Every output keeps other inputs, so every row has a system of its own. Shapes: O outputs, C inputs, K kept ones.
"""

import torch

from structprune.structured.reconstruct import NEVER, Products, output_error

SOLVE_BYTES = 256 * 2**20  # of the rows' systems that are solved at once
SAMPLE = 32  # rows on which the damping is chosen
NOISE = 1e-7  # gains that products summed in fp32 cannot tell, relative to the power of the output


def refit_rows(
    weight: torch.Tensor, kept: torch.Tensor, wanted: torch.Tensor, gram: torch.Tensor, damping: float
) -> torch.Tensor | None:
    """W_new = W + (W·C - W·G)_K (G_KK + λI)⁻¹ on every row's kept inputs K, the minimiser under the mask of
    ‖W_new X̂ᵀ - W_dense Xᵀ‖² + λ‖W_new - W‖².

    Args:
        weight: (O, C) fp64, zero where `kept` (O, C) bool is false.
        wanted: (O, C) W_dense XᵀX̂. gram: (C, C) X̂ᵀX̂.
        damping: λ relative to the mean diagonal of the row's G_KK; infinity returns `weight`.
    Returns:
        (O, C), or None where a row's system is not positive definite.
    """
    if damping == NEVER:
        return weight
    residual = wanted - weight @ gram  # (O, C)
    power = gram.diagonal()  # (C,)
    counts = kept.sum(1)  # (O,)
    order = torch.argsort(counts)  # rows with about as many kept inputs are solved together
    moved = weight.clone()  # (O, C)
    start = 0
    while start < len(order):
        rows = _fitting(order[start:], counts, gram.element_size())  # (B,)
        start += len(rows)
        width = int(counts[rows[-1]])
        if width == 0:
            continue
        columns, real = _indices(kept[rows], width)  # (B, K), (B, K)
        system = gram[columns[:, :, None], columns[:, None, :]]  # (B, K, K)
        pairs = real[:, :, None] & real[:, None, :]  # (B, K, K)
        system.mul_(pairs)
        ridge = (
            damping * (power[columns] * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        )  # (B, 1)
        system.diagonal(dim1=1, dim2=2).add_(torch.where(real, ridge, 1.0))  # what is no input solves to 0
        factor, failed = torch.linalg.cholesky_ex(system)  # (B, K, K)
        if failed.any():
            return None
        right = residual[rows].gather(1, columns) * real  # (B, K)
        step = torch.cholesky_solve(right[..., None], factor)[..., 0] * real  # (B, K)
        moved[rows] = moved[rows].scatter_add(1, columns, step)  # (B, C)
    return moved


def _fitting(order: torch.Tensor, counts: torch.Tensor, size: int) -> torch.Tensor:
    """As many of the rows left, which are sorted by K, as `SOLVE_BYTES` hold: at least one."""
    systems = torch.arange(1, len(order) + 1, device=order.device) * counts[order].double() ** 2 * size  # (R,) bytes
    return order[: max(1, int((systems <= SOLVE_BYTES).sum()))]


def _indices(kept: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column indices of the kept inputs, filled up to `width`: (B, C) bool -> (B, K) int64 and which are real."""
    columns = torch.argsort(kept.byte(), dim=1, descending=True, stable=True)[:, :width]  # (B, K)
    return columns, kept.gather(1, columns)


def choose_refit(
    weight: torch.Tensor, kept: torch.Tensor, fit: Products, check: Products, candidates: tuple[float, ...]
) -> tuple[torch.Tensor, float, float]:
    """The refit whose damping has the least held-out output error on some rows; none where that is no gain.

    Args:
        weight: (O, C) fp64, masked. kept: (O, C) bool.
        fit, check: products over the rows that are fitted, and over held-out ones.
    Returns:
        (weight (O, C), damping, held-out output error less the unchanged weight's)
    """
    some = torch.linspace(0, len(weight) - 1, min(SAMPLE, len(weight)), device=weight.device).long()  # (s,)
    best, gain = NEVER, 0.0
    plain = output_error(weight[some], check.wanted[some], check.gram)
    for damping in sorted(candidates):
        tried = refit_rows(weight[some], kept[some], fit.wanted[some], fit.gram, damping)  # (s, C)
        if tried is None:
            continue
        found = output_error(tried, check.wanted[some], check.gram) - plain
        if found < gain:
            best, gain = damping, found
    for best in sorted(damping for damping in (*candidates, NEVER) if damping >= best):
        moved = refit_rows(weight, kept, fit.wanted, fit.gram, best)  # (O, C)
        if moved is not None:  # a row that was not tried may need more damping
            break
    whole = output_error(moved, check.wanted, check.gram) - output_error(weight, check.wanted, check.gram)
    return (moved, best, whole) if whole < -NOISE * check.power else (weight, NEVER, 0.0)
