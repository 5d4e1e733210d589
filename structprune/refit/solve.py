"""Closed-form least squares for the remaining weights of one linear, in delta form (docs/methods.md section 5).

Pure functions of Gram matrices. Shapes: O outputs, K remaining input channels.
"""

from collections.abc import Iterator, Sequence

import torch

from structprune.config import ReconstructSettings
from structprune.refit.products import NOISE, UNCHANGED, Choice, Products, output_error
from structprune.workers import ALONE, Workers


def refit_weight(
    weight: torch.Tensor, gap: torch.Tensor, gram: torch.Tensor, damping: float, features: int
) -> torch.Tensor | None:
    """W_new = W_K + (W·C - W_K·G)(G + λI)⁻¹, the minimiser of ‖W_new X̂_Kᵀ - W Xᵀ‖² + λ‖W_new - W_K‖².

    Args:
        weight: (O, K) W_K. gram: (K, K) G = X̂_KᵀX̂_K.
        gap: (O, K) of `target_gap`, which all dampings share.
        damping: λ relative to the mean diagonal of G over its first `features` rows.
        features: number of real features, so that an appended constant does not change λ.
    Returns:
        (O, K) fp64, or None where G + λI is not positive definite.
    """
    ridge = gram.to(torch.float64, copy=True)  # (K, K)
    ridge.diagonal().add_(damping * ridge.diagonal()[:features].mean())
    factor, failed = torch.linalg.cholesky_ex(ridge)  # (K, K)
    del ridge  # before the solve, whose memory is the peak
    if failed:  # one device sync per candidate and layer, which takes less than the factorisation
        return None
    return torch.cholesky_solve(gap.T, factor).T.add_(weight)  # (O, K)


def target_gap(weight: torch.Tensor, target: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """W·C - W_K·G (O, K) fp64: weight (O, K) W_K, target (O, K) W·C = W XᵀX̂_K, gram (K, K) G."""
    return (weight @ gram.double()).neg_().add_(target)  # (O, K)


def refit_bias(weight: torch.Tensor, target: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Only the weight of the constant, the last feature, changes, by the mean residual of the output (FLAP's
    compensation). Only the last columns of target (O, .) and gram (K, .) are read."""
    residual = target[:, -1] - weight @ gram[:, -1].double()  # (O,)
    moved = weight.clone()  # (O, K)
    moved[:, -1] += residual / gram[-1, -1]
    return moved


def choose(
    settings: ReconstructSettings,
    weight: torch.Tensor,
    fit: Products,
    check: Products,
    features: int,
    workers: Workers = ALONE,
) -> Choice:
    """The candidate with the least held-out output error; plain removal is always among them, and where no candidate
    gains more than rounding would, as on a prefix that lost nothing, it stays.

    Args:
        workers: who have the same products, and share the candidates.
    """
    plain = output_error(weight, check.target, check.gram)
    best = (weight, UNCHANGED, 0.0)
    dampings = [0.0] if settings.mode == "bias" else sorted(set(settings.damping))
    for candidate, damping in candidates(settings, weight, fit, dampings[workers.rank :: workers.count], features):
        gain = output_error(candidate, check.target, check.gram) - plain
        if gain < min(best[2], -NOISE * check.power):
            best = (candidate, damping, gain)
    return shared_best(best, workers)


def candidates(
    settings: ReconstructSettings, weight: torch.Tensor, fit: Products, dampings: Sequence[float], features: int
) -> Iterator[tuple[torch.Tensor, float]]:
    """Refitted weights (O, K) and their dampings, of those that can be solved.

    One by one: the factors of all together would be the peak of memory.
    """
    if settings.mode == "bias":
        yield from ((refit_bias(weight, fit.target, fit.gram), damping) for damping in dampings)
    if settings.mode == "bias" or not dampings:
        return
    gap = target_gap(weight, fit.target, fit.gram)  # (O, K)
    for damping in dampings:
        solution = refit_weight(weight, gap, fit.gram, damping, features)
        if solution is not None:
            yield solution, damping


def shared_best(own: Choice, workers: Workers) -> Choice:
    """The choice with the largest gain of all processes, in all of them; of equal ones the least damping, as alone."""
    if not workers.several:
        return own
    gain, damping, rank = min((*pair, rank) for rank, pair in enumerate(workers.gather((own[2], own[1]))))
    if damping == UNCHANGED:
        return own
    weight = own[0].contiguous() if rank == workers.rank else torch.zeros_like(own[0])  # (O, K)
    workers.add_up(weight)  # zeros of the others change no bit
    return weight, damping, gain
