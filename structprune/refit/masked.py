"""Refit of the kept weights on a fixed mask, in delta form (docs/methods.md section 5, row by row).

Every output keeps other inputs, so every row has a system of its own; conjugate gradients solve all of them at once by
products with the one Gram matrix that they are parts of, where factorising each would take C³ operations a row.
Shapes: O outputs, C inputs, K kept ones.
"""

import torch

from structprune.refit.reconstruct import NEVER, Products, output_error, output_errors

SAMPLE = 32  # rows on which the damping is chosen
NOISE = 1e-7  # gains that products summed in fp32 cannot tell, relative to the power of the output
STEPS = 200  # of conjugate gradients at most; whatever is reached by then is nearer to the minimum than where it began
TOLERANCE = 1e-3  # of every row's residual, relative to where it began
EVERY = 5  # steps between looks at the residuals, which make an accelerator wait


def refit_rows(
    weight: torch.Tensor,
    kept: torch.Tensor,
    wanted: torch.Tensor,
    gram: torch.Tensor,
    damping: float,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """W_new = W + (W·C - W·G)_K (G_KK + λI)⁻¹ on every row's kept inputs K, the minimiser under the mask of
    ‖W_new X̂ᵀ - W_dense Xᵀ‖² + λ‖W_new - W‖².

    Args:
        weight: (O, C) fp64, zero where `kept` (O, C) bool is false.
        wanted: (O, C) W_dense XᵀX̂. gram: (C, C) X̂ᵀX̂.
        damping: λ relative to the mean diagonal of the row's G_KK; infinity returns `weight`.
        tolerance: of what is left of (W·C - W·G)_K. dtype: of the steps.
    Returns:
        (O, C) fp64.
    """
    if damping == NEVER:
        return weight
    return refit_each(weight, kept, wanted, gram, (damping,), tolerance, dtype)[0]


def refit_each(
    weight: torch.Tensor,
    kept: torch.Tensor,
    wanted: torch.Tensor,
    gram: torch.Tensor,
    dampings: tuple[float, ...],
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`refit_rows` for several finite dampings at once, (n, O, C): every step reads the Gram matrix once for all of
    them, which for few rows is what a step costs. Rounding apart, each is what it is alone."""
    unit = gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)  # (), so that fp32 has range to spare
    power = gram.diagonal() / unit  # (C,)
    mean = (power * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)  # (O, 1)
    ridge = torch.cat([damping * mean for damping in dampings])  # (n * O, 1)
    residual = (wanted - weight @ gram) / unit * kept  # (O, C)
    size = residual.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)  # (O, 1)
    right, system = (residual / size).to(dtype), (gram / unit).to(dtype)  # (O, C), (C, C)
    stacked = (len(dampings), *weight.shape)
    right, kept = (each.expand(stacked).flatten(0, 1) for each in (right, kept))  # (n * O, C) each, one is no copy
    step = conjugate_gradients(system, right, kept, ridge.to(dtype), tolerance, len(dampings))  # (n * O, C)
    return weight + step.view(stacked).double() * size


def conjugate_gradients(
    gram: torch.Tensor, right: torch.Tensor, kept: torch.Tensor, ridge: torch.Tensor, tolerance: float, sets: int = 1
) -> torch.Tensor:
    """Rows x with (G_KK + λI) x_K = b_K and 0 elsewhere, by conjugate gradients preconditioned with the diagonal.

    Args:
        gram: (C, C) G. right: (O, C) b, of norm 1 or 0 in every row. kept: (O, C) bool. ridge: (O, 1) λ.
        tolerance: of every row's ‖b - (G_KK + λI) x‖.
        sets: the rows are so many sets of equal size; one rests as soon as all its rows are within the tolerance.
    Returns:
        (O, C); a row where G + λI is not positive definite stays where that showed.
    """
    inside = kept.to(gram.dtype)  # (O, C)
    diagonal = gram.diagonal() + ridge  # (O, C)
    scale = inside / torch.where(diagonal > 0, diagonal, 1.0)  # (O, C)
    x, left = torch.zeros_like(right), right.clone()  # (O, C) each
    direction = scale * left  # (O, C)
    slope = (left * direction).sum(1, keepdim=True)  # (O, 1)
    found, moving = {}, list(range(sets))  # set -> (rows, C) of those that rest; the others
    for count in range(STEPS):
        image = inside * (direction @ gram) + ridge * direction  # (O, C)
        curve = (direction * image).sum(1, keepdim=True)  # (O, 1)
        goes = curve > 0  # (O, 1)
        length = torch.where(goes, slope / curve, 0.0)  # (O, 1)
        x += length * direction
        left -= length * image
        if count % EVERY == EVERY - 1:
            rests = (left.norm(dim=1).view(len(moving), -1).amax(1) <= tolerance).tolist()  # one look of the host
            if all(rests):
                break
            if any(rests):  # the others go on without them
                found |= {moving[place]: x.chunk(len(moving))[place] for place, rest in enumerate(rests) if rest}
                going = [place for place, rest in enumerate(rests) if not rest]
                state = (x, left, direction, slope, inside, ridge, scale, goes)
                x, left, direction, slope, inside, ridge, scale, goes = (
                    part.unflatten(0, (len(moving), -1))[going].flatten(0, 1) for part in state
                )
                moving = [moving[place] for place in going]
        scaled = scale * left  # (O, C)
        before, slope = slope, (left * scaled).sum(1, keepdim=True)  # (O, 1)
        direction = torch.where(goes, scaled + slope / before * direction, 0.0)  # (O, C)
    if not found:
        return x
    found |= dict(zip(moving, x.chunk(len(moving))))
    return torch.cat([found[index] for index in range(sets)])


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
    tried, best, gain = sorted(set(candidates) - {NEVER}), NEVER, 0.0
    if not tried:
        return weight, NEVER, 0.0
    moved = refit_each(weight[some], kept[some], fit.wanted[some], fit.gram, tried)  # (n, s, C)
    plain, *found = output_errors(torch.cat((weight[some][None], moved)), check.wanted[some], check.gram)
    for damping, error in zip(tried, found):
        if error - plain < gain:
            best, gain = damping, error - plain
    moved = refit_rows(weight, kept, fit.wanted, fit.gram, best)  # (O, C)
    whole = output_error(moved, check.wanted, check.gram) - output_error(weight, check.wanted, check.gram)
    return (moved, best, whole) if whole < -NOISE * check.power else (weight, NEVER, 0.0)
