"""SparseGPT: weights are removed column by column, and later columns compensate (arXiv 2301.00774).

Pure functions of weights and a Gram matrix. Shapes: O outputs, C inputs, b columns of a block.
"""

from dataclasses import dataclass

import torch

from structprune.config import MaskingSettings
from structprune.masking.patterns import group_mask, pooled_mask
from structprune.masking.scores.linears import Linears, Outcome
from structprune.models.finite import all_finite

MOST_DAMPING = 1e6  # far above what any finite Gram matrix needs
SOLVED = 256  # most rows of a triangular matrix that are inverted without dividing it
INNER = 32  # columns whose updates reach the rest of their block as one product


@dataclass(frozen=True)
class Factor:
    """A factored Gram matrix."""

    upper: torch.Tensor  # (C, C) fp32 U, upper triangular, with (G + λI)⁻¹ = UᵀU
    dead: torch.Tensor  # (C,) bool, inputs that were always 0
    damping: float  # λ relative to the mean diagonal; more than configured where the factorisation needed it


def factorise(gram: torch.Tensor, damping: float = 0.01) -> Factor:
    """U of the damped inverse, from one Cholesky factorisation.

    With J the reversal of the order, J (G + λI) J = L Lᵀ; then G + λI = R Rᵀ with R = J L J upper triangular, so that
    U = R⁻¹. Damping is raised tenfold until the factorisation succeeds: too few tokens for the inputs never fail.

    Args:
        gram: (C, C) Σ x̃ x̃ᵀ; its scale does not matter.
        damping: λ relative to the mean diagonal.
    Raises:
        ValueError: the Gram matrix holds NaN or infinity.
        torch.linalg.LinAlgError: its numbers are so large that damping overflows.
    """
    if not all_finite(gram):  # one device sync per input, as for `failed` below
        raise ValueError("a Gram matrix holds NaN or infinity: the activations overflow in this dtype, use float32")
    turned = gram.float().flip(0, 1)  # (C, C), a copy
    del gram  # where the caller dropped it too, at most three matrices are alive
    dead = turned.diagonal() == 0  # (C,)
    # (), before dead inputs get 1, which has no unit; in fp64, because fp32 may overflow
    scale = turned.diagonal().double().mean()
    turned.diagonal().masked_fill_(dead, 1)
    added = 0.0
    while True:
        turned.diagonal().add_((damping - added) * scale)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(turned)  # (C, C)
        if not failed:
            break
        if damping > MOST_DAMPING:
            raise torch.linalg.LinAlgError("the Gram matrix cannot be factored")
        damping = max(10 * damping, 1e-4)
    del turned
    inverse = torch.zeros_like(lower)  # (C, C)
    invert_lower(lower, inverse)
    del lower
    return Factor(inverse.flip(0, 1), dead.flip(0), damping)


def invert_lower(lower: torch.Tensor, inverse: torch.Tensor) -> None:
    """Write L⁻¹ into `inverse` (C, C), which holds zeros; lower (C, C) L.

    Half by half: with L = [[A, 0], [B, D]], L⁻¹ = [[A⁻¹, 0], [-D⁻¹ B A⁻¹, D⁻¹]]. Solving for the columns of the
    identity instead takes 1.5 times the operations, and twice the time on a CPU.
    """
    size = len(lower)
    if size <= SOLVED:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)  # (C, C)
        inverse.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    first, second = slice(0, size // 2), slice(size // 2, size)
    for half in (first, second):
        invert_lower(lower[half, half], inverse[half, half])
    corner = lower[second, first] @ inverse[first, first]  # (C / 2, C / 2)
    inverse[second, first] = torch.mm(inverse[second, second], corner).neg_()


def sparsegpt(
    weights: list[torch.Tensor],
    factor: Factor,
    ratio: float = 0.5,
    nm: tuple[int, int] | None = None,
    column_block: int = 128,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prune and update linears that read the same input.

    Scores are W² / U_cc². Unstructured: of each block of columns every matrix loses the lowest `int(O * b * ratio)`
    entries and one more. N:M: at each group's first column every row loses the N lowest of the weights as updated by
    then. The error (w - q) / U_cc of a column is spread over the columns right of it by U.

    Args:
        weights: (O_i, C) each.
        nm: (N, M) removes N of every M neighbouring columns; None for unstructured.
        column_block: b; columns of a block choose their mask together.
    Returns:
        For every matrix its new weights (O_i, C) fp32 and its mask (O_i, C) bool, true where a weight stays.
    """
    sizes = [len(weight) for weight in weights]
    current = torch.cat([weight.float() for weight in weights]).T.contiguous()  # (C, O): a column is one row in memory
    current.masked_fill_(factor.dead[:, None], 0)
    keep = torch.ones(current.shape, dtype=torch.bool, device=current.device)  # (C, O)
    columns = len(current)
    step = column_block if nm is None else max(nm[1], column_block // nm[1] * nm[1])  # groups are not cut
    for start in range(0, columns, step):
        block = slice(start, min(start + step, columns))
        upper = factor.upper[block, block]  # (b, b)
        if nm is None:
            score = (current[block] / upper.diagonal()[:, None]).square_()  # (b, O)
            keep[block] = torch.cat([pooled_mask(part, ratio) for part in score.split(sizes, dim=1)], dim=1)  # (b, O)
        errors = _prune_block(current[block], keep[block], upper, nm)  # (b, O)
        current[block.stop :].addmm_(factor.upper[block, block.stop :].T, errors, alpha=-1)  # (C - stop, O)
    current *= keep
    return [(w.T.contiguous(), k.T.contiguous()) for w, k in zip(current.split(sizes, dim=1), keep.split(sizes, dim=1))]


def _prune_block(current: torch.Tensor, keep: torch.Tensor, upper: torch.Tensor, nm: tuple[int, int] | None):
    """Go through a block's columns: (b, O) weights and mask in place, U (b, b) -> errors (b, O).

    Updates reach `INNER` columns (whole groups) at once and the rest of the block as one product.
    """
    width = len(current)
    inner = INNER if nm is None else max(1, INNER // nm[1]) * nm[1]
    scale = upper.diagonal()[:, None]  # (b, 1)
    # an error is w / scale where w is removed, else 0: dividing by infinity saves an operation
    divisor = torch.where(keep, torch.inf, scale) if nm is None else torch.empty_like(current)  # (b, O)
    errors = torch.empty_like(current)  # (b, O)
    for first in range(0, width, inner):
        last = min(first + inner, width)
        for column in range(first, last):
            if nm is not None and (column - first) % nm[1] == 0:
                group = slice(column, column + nm[1])
                score = (current[group] / scale[group]).square_()  # (M, O)
                keep[group] = group_mask(score.T, *nm).T  # (M, O)
                divisor[group] = torch.where(keep[group], torch.inf, scale[group])  # (M, O)
            torch.div(current[column], divisor[column], out=errors[column])  # (O,)
            if column + 1 < last:
                current[column + 1 : last].addr_(upper[column, column + 1 : last], errors[column], alpha=-1)  # (., O)
        current[last:].addmm_(upper[first:last, last:].T, errors[first:last], alpha=-1)  # (b - last, O)
    return errors


def mask_linears(linears: Linears, settings: MaskingSettings) -> Outcome:
    """SparseGPT on the linears of one input.

    Raises:
        FloatingPointError: weights whose scores overflow.
        torch.linalg.LinAlgError: as `factorise`.
    """
    removal = linears.removal
    if removal.nm is None and removal.ratio == 0:
        return Outcome([(weight, torch.ones_like(weight, dtype=torch.bool)) for weight in linears.weights])
    factor = factorise(linears.take_statistic(), settings.damping)  # no other reference, so its memory is freed
    largest = max(weight.abs().max() for weight in linears.weights) / factor.upper.diagonal().min()  # ()
    if not largest.square().isfinite():  # one device sync per input
        raise FloatingPointError("scores overflow")
    masked = sparsegpt(linears.weights, factor, removal.ratio, removal.nm, settings.column_block)
    return Outcome(masked, factor.damping, int(factor.dead.sum()))
