"""Refit of the kept weights under a fixed mask, in delta form (docs/methods.md section 5, row by row).

Every output keeps different inputs, so every row has its own linear system. Conjugate gradients solve all of them at
once by products with the one Gram matrix they share; factorising each would take C³ operations per row.
Shapes: O outputs, C inputs, K kept ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from structprune.refit.products import NOISE, UNCHANGED, Choice, Products, output_error, output_errors
from structprune.workers import ALONE, Workers

SAMPLE = 32  # rows on which the damping is chosen
STEPS = 200  # most steps of conjugate gradients; the result is always nearer to the minimum than the start
TOLERANCE = 1e-3  # of every row's residual, relative to its start
EVERY = 5  # steps between checks of the residuals, each a device sync


@dataclass(frozen=True)
class Stop:
    """When conjugate gradients stop: with all rows of a set within the tolerance, those of other processes too.

    So a row is the same, up to rounding, whoever solves it.
    """

    tolerance: float = TOLERANCE
    workers: Workers = ALONE

    def reached(self, norms: torch.Tensor) -> list[bool]:
        """Whether each set stops; norms (sets, rows) of residuals. One device sync."""
        moving = (~(norms <= self.tolerance).all(1)).float()  # (sets,)
        self.workers.add_up(moving)
        return (moving == 0).tolist()


def refit_rows(
    weight: torch.Tensor,
    keep: torch.Tensor,
    fit: Products,
    dampings: Sequence[float],
    stop: Stop = Stop(),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """W_new = W + (W·C - W·G)_K (G_KK + λI)⁻¹ on every row's kept inputs K, the minimiser under the mask of
    ‖W_new X̂ᵀ - W_dense Xᵀ‖² + λ‖W_new - W‖².

    Every step reads the Gram matrix once for all dampings, which dominates the cost for few rows. Up to rounding, each
    result equals its own run.

    Args:
        weight: (O, C) fp64, zero where `keep` (O, C) bool is false.
        dampings: λ relative to the mean diagonal of the row's G_KK, n finite values.
        stop: its tolerance is of the residual (W·C - W·G)_K, relative to its start.
    Returns:
        (n, O, C) fp64.
    """
    gram, target = fit.gram, fit.target  # (C, C), (O, C)
    unit = gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)  # (), so that fp32 has range to spare
    power = gram.diagonal() / unit  # (C,)
    mean = (power * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)  # (O, 1)
    ridge = torch.cat([damping * mean for damping in dampings])  # (n * O, 1)
    residual = (target - weight @ gram) / unit * keep  # (O, C)
    size = residual.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)  # (O, 1)
    right, system = (residual / size).to(dtype), (gram / unit).to(dtype)  # (O, C), (C, C)
    stacked = (len(dampings), *weight.shape)
    right, keep = (each.expand(stacked).flatten(0, 1) for each in (right, keep))  # (n * O, C) each, one is no copy
    step = conjugate_gradients(system, right, keep, ridge.to(dtype), stop, len(dampings))  # (n * O, C)
    return weight + step.view(stacked).double() * size


def conjugate_gradients(
    gram: torch.Tensor, right: torch.Tensor, keep: torch.Tensor, ridge: torch.Tensor, stop: Stop, sets: int = 1
) -> torch.Tensor:
    """Rows x with (G_KK + λI) x_K = b_K and 0 elsewhere, by conjugate gradients preconditioned with the diagonal.

    Args:
        gram: (C, C) G. right: (O, C) b, of norm 1 or 0 in every row. keep: (O, C) bool. ridge: (O, 1) λ.
        stop: its tolerance is of every row's ‖b - (G_KK + λI) x‖.
        sets: the rows form so many sets of equal size, which stop one by one.
    Returns:
        (O, C); a row stops where G + λI turns out not to be positive definite.
    """
    inside = keep.to(gram.dtype)  # (O, C)
    diagonal = gram.diagonal() + ridge  # (O, C)
    scale = inside / torch.where(diagonal > 0, diagonal, 1.0)  # (O, C)
    x, residual = torch.zeros_like(right), right.clone()  # (O, C) each
    direction = scale * residual  # (O, C)
    slope = (residual * direction).sum(1, keepdim=True)  # (O, 1)
    solved: dict[int, torch.Tensor] = {}  # set -> (rows, C), of sets that have stopped
    moving = list(range(sets))
    for count in range(STEPS):
        image = inside * (direction @ gram) + ridge * direction  # (O, C)
        curve = (direction * image).sum(1, keepdim=True)  # (O, 1)
        goes = curve > 0  # (O, 1)
        length = torch.where(goes, slope / curve, 0.0)  # (O, 1)
        x += length * direction
        residual -= length * image
        if count % EVERY == EVERY - 1:
            stops = stop.reached(residual.norm(dim=1).view(len(moving), -1))
            if all(stops):
                break
            if any(stops):  # the others continue without them
                solved |= {moving[place]: x.chunk(len(moving))[place] for place, ends in enumerate(stops) if ends}
                going = [place for place, ends in enumerate(stops) if not ends]
                state = (x, residual, direction, slope, inside, ridge, scale, goes)
                x, residual, direction, slope, inside, ridge, scale, goes = (
                    part.unflatten(0, (len(moving), -1))[going].flatten(0, 1) for part in state
                )
                moving = [moving[place] for place in going]
        scaled = scale * residual  # (O, C)
        before, slope = slope, (residual * scaled).sum(1, keepdim=True)  # (O, 1)
        direction = torch.where(goes, scaled + slope / before * direction, 0.0)  # (O, C)
    if not solved:
        return x
    solved |= dict(zip(moving, x.chunk(len(moving))))
    return torch.cat([solved[index] for index in range(sets)])


def share_rows(
    weight: torch.Tensor, keep: torch.Tensor, fit: Products, dampings: Sequence[float], workers: Workers
) -> torch.Tensor:
    """`refit_rows`, where every process solves its part of the rows.

    Returns:
        (n, O, C) fp64, the same in all processes.
    """
    if not workers.several or len(weight) < workers.count:
        return refit_rows(weight, keep, fit, dampings)
    own = workers.span(len(weight))
    moved = weight.new_zeros((len(dampings), *weight.shape))  # (n, O, C)
    sums, stop = replace(fit, target=fit.target[own]), Stop(workers=workers)
    moved[:, own] = refit_rows(weight[own], keep[own], sums, dampings, stop)
    workers.add_up(moved)  # zeros of the others change no bit
    return moved


def choose_refit(
    weight: torch.Tensor,
    keep: torch.Tensor,
    fit: Products,
    check: Products,
    candidates: Sequence[float],
    workers: Workers = ALONE,
) -> Choice:
    """The refit at the damping with the least held-out output error on a sample of rows; none without a gain.

    Args:
        weight: (O, C) fp64, masked. keep: (O, C) bool.
        fit, check: products over the fitted rows, and over held-out rows.
        workers: who have the same products, and share the rows.
    """
    sample = torch.linspace(0, len(weight) - 1, min(SAMPLE, len(weight)), device=weight.device).long()  # (s,)
    tried, best, gain = sorted(set(candidates) - {UNCHANGED}), UNCHANGED, 0.0
    if not tried:
        return weight, UNCHANGED, 0.0
    sums = replace(fit, target=fit.target[sample])
    moved = share_rows(weight[sample], keep[sample], sums, tried, workers)  # (n, s, C)
    plain, *errors = output_errors(torch.cat((weight[sample][None], moved)), check.target[sample], check.gram)
    for damping, error in zip(tried, errors):
        if error - plain < gain:
            best, gain = damping, error - plain
    best = workers.gather(best)[0]  # rounding must not let processes choose differently
    if best == UNCHANGED:
        return weight, UNCHANGED, 0.0
    (moved,) = share_rows(weight, keep, fit, (best,), workers)  # (O, C)
    whole = output_error(moved, check.target, check.gram) - output_error(weight, check.target, check.gram)
    return (moved, best, whole) if whole < -NOISE * check.power else (weight, UNCHANGED, 0.0)
