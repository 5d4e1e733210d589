"""Closed-form least squares for the remaining weights of one linear, in delta form (docs/methods.md section 5).

Pure functions of Gram matrices. Shapes: O outputs, K remaining input channels.
"""

from collections.abc import Iterable

import torch

from structprune.config import ReconstructSettings
from structprune.refit.products import NOISE, UNCHANGED, Choice, Products, output_error


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
    settings: ReconstructSettings, weight: torch.Tensor, fit: Products, check: Products, features: int
) -> Choice:
    """The candidate with the least held-out output error; plain removal is always among them, and where no candidate
    gains more than rounding would, as on a prefix that lost nothing, it stays."""
    plain = output_error(weight, check.target, check.gram)
    best = (weight, UNCHANGED, 0.0)
    if settings.mode == "bias":
        candidates: Iterable[tuple[torch.Tensor | None, float]] = [(refit_bias(weight, fit.target, fit.gram), 0.0)]
    else:
        gap = target_gap(weight, fit.target, fit.gram)  # (O, K)
        # one by one: the factors of all candidates together would be the peak of memory
        candidates = (
            (refit_weight(weight, gap, fit.gram, damping, features), damping) for damping in sorted(settings.damping)
        )
    for candidate, damping in candidates:
        if candidate is None:
            continue
        gain = output_error(candidate, check.target, check.gram) - plain
        if gain < min(best[2], -NOISE * check.power):
            best = (candidate, damping, gain)
    return best
