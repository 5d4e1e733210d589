"""Weighted moments and Gram matrices of activations: pure functions, fp32 sums over a pass merged in fp64."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.statistics.half import Product, half_product, split_terms


@dataclass(frozen=True)
class Moments:
    """Moments of C features over rows weighted by ω², in fp64."""

    weight: torch.Tensor  # () Σ ω²
    mean: torch.Tensor  # (C,) Σ ω² x / Σ ω²
    spread: torch.Tensor  # (C,) Σ ω² (x - mean)²

    @property
    def variance(self) -> torch.Tensor:
        """(C,) weighted population variance."""
        return self.spread / self.weight

    @property
    def squared_norm(self) -> torch.Tensor:
        """(C,) ‖X̃[:, c]‖² = Σ (ω x)²."""
        return self.spread + self.weight * self.mean**2

    def to(self, device: torch.device) -> "Moments":
        """The same on a device."""
        return Moments(self.weight.to(device), self.mean.to(device), self.spread.to(device))


def moments(x: torch.Tensor, weight: torch.Tensor | None = None) -> Moments:
    """Moments of rows x (..., C), row weights ω (...) or None for ones.

    The mean is subtracted before squaring, so that a large mean does not swamp the variance.
    """
    rows = x.flatten(0, -2).float()  # (R, C)
    squares = torch.ones(len(rows), device=x.device) if weight is None else weight.reshape(-1).float() ** 2  # (R,)
    total = squares.double().sum()  # ()
    mean = (squares @ rows).double() / total.clamp(min=torch.finfo(torch.float64).tiny)  # (C,)
    spread = (squares @ (rows - mean.float()) ** 2).double()  # (C,)
    return Moments(total, mean, spread)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets of rows (Chan, Golub, LeVeque 1979)."""
    total = a.weight + b.weight  # ()
    share = b.weight / total.clamp(min=torch.finfo(torch.float64).tiny)  # ()
    gap = b.mean - a.mean  # (C,)
    return Moments(total, a.mean + share * gap, a.spread + b.spread + a.weight * share * gap**2)


def empty_sum(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """(rows, columns) zeros that `add_products` and `add_gram` add to: fp64.

    A refit with a small damping λ amplifies the rounding of its sums by up to 1 / λ. In fp32 the weights of several
    processes, which add rows in another order, would differ from one process's by that.
    """
    return torch.zeros(rows, columns, dtype=torch.float64, device=device)


def add_products(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """total (A, C) += Σ ω² left rightᵀ, in place: rows left (..., T, A), right (..., T, C), ω (..., T).

    Products are fp32, and so are their sums over the rows that `_batches` gives; these are added in the total's dtype.
    """
    for a, b, omega in _batches(left, right, weight):  # (r, A), (r, C), (r,)
        terms, b, product = _half_terms(a, b, omega)
        if product is None:
            a, b = a.float(), b.float()  # (r, A), (r, C)
            terms, product = [a if omega is None else a * omega[:, None].float() ** 2], Tensor.addmm_
        _add_tiles(total, terms, b, product)
    return total


def add_rows(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """total (C, 1) fp64 += Σ ω² x, in place: rows x (..., C), ω (...).

    Products are fp32 and their sum fp64: neither the order of rows nor how processes share them shows.
    """
    terms = x.flatten(0, -2).float() * weight.reshape(-1, 1).float() ** 2  # (R, C)
    return total.add_(terms.sum(0, dtype=torch.float64)[:, None])


def _half_terms(left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor | None):
    """How to multiply rows in their own half-precision dtype: the terms that sum to ω² left, right, and the product.

    Rows without a weight are multiplied exactly. Weighted bf16 entries have more digits, so the whole weight is applied
    on the left, as a sum of two bf16 terms: the error (2⁻¹⁷) is below that of an fp32 sum over thousands of rows, where
    one term would lose 2⁻⁸. fp16 has too little range for ω² left, so with a weight its rows become fp32.

    Returns:
        (terms of (R, A), right (R, C), product); product is None where rows must become fp32.
    """
    product = half_product(left.device, left.dtype) if left.dtype == right.dtype else None
    if product is None or (weight is not None and left.dtype != torch.bfloat16):
        return [], right, None
    if weight is None:
        return [left], right, product
    return split_terms(left * weight.reshape(-1, 1).float() ** 2), right, product


LEAST_POWER = 1e-10  # of the residual stream, far below the norms' epsilon: a stream of zeros gets a finite weight
# rows and columns of a matrix product computed at a time: beside the rest of a sum they stay in a CPU's cache
PRODUCT_TILE = {"cpu": (384, 4096)}
DEVICE_PRODUCT_TILE = (2048, 8192)
# devices that sum products sequence by sequence; an accelerator would take longer to add such small sums than to
# multiply, and its half-precision activations depend on who shares a pass all the same
BY_SEQUENCE = {"cpu"}


def _batches(
    left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Rows whose products are one fp32 sum: left (r, A), right (r, C), ω (r,).

    Those of one sequence on a device of `BY_SEQUENCE`, so that it does not show which sequences share a pass or a
    process; else all, as are the single rows (r, .) of an expert, whose last bits depend on who shares its pass anyway.
    """
    rows = left.flatten(0, -2), right.flatten(0, -2)  # (R, A), (R, C)
    omega = None if weight is None else weight.reshape(-1)  # (R,)
    if left.dim() < 3 or left.device.type not in BY_SEQUENCE:
        yield *rows, omega
        return
    size = left.shape[-2]
    for start in range(0, len(rows[0]), size):
        part = slice(start, start + size)
        yield rows[0][part], rows[1][part], None if omega is None else omega[part]


def _add_tiles(
    total: torch.Tensor, terms: Sequence[torch.Tensor], right: torch.Tensor, product: Product, upper: bool = False
) -> None:
    """total (A, C) += Σ termᵀ right, tile by tile: terms (r, A) each, right (r, C); with `upper` none of the tiles that
    lie below the diagonal."""
    rows, columns = _tile(total.device)
    for top in range(0, len(total), rows):
        bottom = min(top + rows, len(total))
        for start in range(top if upper else 0, total.shape[1], columns):
            stop = min(start + columns, total.shape[1])
            tile = torch.zeros(bottom - top, stop - start, device=total.device)  # (t, c)
            for term in terms:
                product(tile, term[:, top:bottom].T, right[:, start:stop])
            total[top:bottom, start:stop] += tile


def _tile(device: torch.device) -> tuple[int, int]:
    return PRODUCT_TILE.get(device.type, DEVICE_PRODUCT_TILE)


def add_gram(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """total (C, C) += Σ ω² x xᵀ, in place and as `add_products` does: rows x (..., T, C), ω (..., T), None for ones.

    On and above the diagonal only, half the work of the whole; `mirror` completes the matrix.
    """
    for rows, _, omega in _batches(x, x, weight):  # (r, C), (r,)
        terms, right, product = _half_terms(rows, rows, omega)
        if product is None:
            right = rows.float() if omega is None else rows.float() * omega[:, None].float()  # (r, C)
            terms, product = [right], Tensor.addmm_
        _add_tiles(total, terms, right, product, upper=True)
    return total


def mirror(total: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle of a (C, C) matrix below its diagonal, in place and tile by tile.

    A copy of the whole matrix would be the peak of memory at the width of an MLP.
    """
    tile, _ = _tile(total.device)
    for start in range(0, len(total), tile):
        stop = min(start + tile, len(total))
        corner = total[start:stop, start:stop]  # (t, t)
        corner.copy_(torch.triu(corner) + torch.triu(corner, 1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T  # (C - stop, t)
    return total


def squared_norms(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Σ_t (ω x)² of every sequence and feature: x (B, T, C), ω (B, T) -> (B, C) fp32."""
    x = x.float()  # (B, T, C)
    ones = torch.ones(x.shape[:2], device=x.device)
    squares = ones if weight is None else weight.to(x.device).float() ** 2  # (B, T)
    return torch.bmm(squares[:, None], x * x)[:, 0]  # (B, C)


def row_squares(x: torch.Tensor, weight: torch.Tensor | None, sequences: torch.Tensor) -> torch.Tensor:
    """As `squared_norms`, of single rows: x (m, C), ω (m,), the sequence of each (m,) -> (b, C) fp32.

    b is one more than the last sequence with a row, at least one.
    """
    squares = x.float() ** 2 if weight is None else (x.float() * weight.to(x.device).float()[:, None]) ** 2  # (m, C)
    count = int(sequences.max()) + 1 if len(sequences) else 1
    # a product, since index_add goes row by row on a CPU
    own = sequences == torch.arange(count, device=x.device)[:, None]  # (b, m)
    return own.float() @ squares


def relative_weight(states: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Row weights ω (..., T), None for ones, divided by the RMS of the residual stream (..., T, C) that a row's output
    is added to: (..., T) fp32.

    The next norm divides a token by that RMS, so an output error matters in inverse proportion to it. Without this, a
    few tokens with huge residuals dominate.
    """
    scale = states.float().pow(2).mean(-1).clamp(min=LEAST_POWER).rsqrt()  # (..., T)
    return scale if weight is None else weight * scale
