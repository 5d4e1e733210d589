"""The refit in closed form against explicit least squares."""

import pytest
import torch

from structprune.config import ReconstructSettings
from structprune.refit.reconstruct import (
    NEVER,
    Products,
    choose,
    output_error,
    refit_bias,
    refit_weight,
)

KEPT, GONE = [0, 2, 3, 5], [1, 4]


def case(rows: int = 40, seed: int = 0):
    """Correlated inputs x (R, 6), a disturbed prefix's (R, 4) kept ones, row weights (R,) and W (3, 6), fp64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 1
    disturbed = x[:, KEPT] + 0.1 * torch.randn(rows, 4, generator=generator)
    return (
        x.double(),
        disturbed.double(),
        torch.rand(rows, generator=generator).double(),
        torch.randn(3, 6, generator=generator).double(),
    )


def products(x, disturbed, omega, weight):
    """W·C and G as sums over rows weighted by ω²."""
    weighted = disturbed * omega[:, None] ** 2
    return weight @ x.T @ weighted, disturbed.T @ weighted


def stacked(x, disturbed, omega, weight, penalty):
    """The minimiser of ‖W_new X̂ᵀ - W Xᵀ‖² + λ‖W_new - W_K‖² as one least-squares system."""
    left = torch.cat((omega[:, None] * disturbed, penalty**0.5 * torch.eye(disturbed.shape[1]).double()))
    right = torch.cat((omega[:, None] * x @ weight.T, penalty**0.5 * weight[:, KEPT].T))
    return torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("damping", [1e-3, 0.1, 3.0])
def test_refit_is_the_explicit_minimiser(damping):
    x, disturbed, omega, weight = case()
    wanted, gram = products(x, disturbed, omega, weight)
    found = refit_weight(weight[:, KEPT], wanted, gram, damping, 4)
    penalty = damping * gram.diagonal().mean()
    assert torch.allclose(found, stacked(x, disturbed, omega, weight, penalty), rtol=1e-8, atol=1e-10)


def test_growing_damping_falls_back_to_plain_removal():
    x, disturbed, omega, weight = case()
    wanted, gram = products(x, disturbed, omega, weight)
    kept = weight[:, KEPT]
    gaps = [(refit_weight(kept, wanted, gram, damping, 4) - kept).norm().item() for damping in (0.01, 1.0, 100.0, 1e8)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-6 < 1e-2 < gaps[0]
    assert refit_weight(kept, wanted, gram, NEVER, 4) is kept


def test_no_damping_is_plain_least_squares_or_nothing():
    x, disturbed, omega, weight = case()
    found = refit_weight(weight[:, KEPT], *products(x, disturbed, omega, weight), 0.0, 4)
    expected = torch.linalg.lstsq(omega[:, None] * disturbed, omega[:, None] * x @ weight.T).solution.T
    assert torch.allclose(found, expected, rtol=1e-6)
    few = case(rows=3)  # fewer rows than kept channels: no unique minimum
    wanted, gram = products(*few)
    assert refit_weight(few[3][:, KEPT], wanted, gram - 1e-6 * torch.eye(4), 0.0, 4) is None


def test_a_constant_feature_does_not_move_the_damping():
    x, disturbed, omega, weight = case()
    one = torch.full((40, 1), 1000.0).double()  # its size shows whether it counts in the mean of the diagonal
    wanted, gram = products(x, torch.cat((disturbed, one), 1), omega, weight)
    kept = torch.cat((weight[:, KEPT], torch.zeros(3, 1)), 1)
    scale = gram.diagonal()[:4].mean()
    gap = (wanted - kept @ gram) @ torch.linalg.inv(gram + 0.1 * scale * torch.eye(5))
    assert torch.allclose(refit_weight(kept, wanted, gram, 0.1, 4), kept + gap, rtol=1e-6)


def test_output_error_is_the_error_less_the_wanted_power():
    x, disturbed, omega, weight = case()
    wanted, gram = products(x, disturbed, omega, weight)
    for candidate in (weight[:, KEPT], torch.zeros(3, 4).double(), refit_weight(weight[:, KEPT], wanted, gram, 0.1, 4)):
        gap = (disturbed @ candidate.T - x @ weight.T) * omega[:, None]
        power = ((x @ weight.T) * omega[:, None]).pow(2).sum()
        assert output_error(candidate, wanted, gram) == pytest.approx((gap.pow(2).sum() - power).item(), rel=1e-9)


def test_bias_mode_is_flaps_compensation():
    x, _, omega, weight = case()
    bias = torch.tensor([[0.5], [-1.0], [2.0]]).double()
    one = torch.ones(40, 1).double()
    wanted, gram = products(
        torch.cat((x, one), 1), torch.cat((x[:, KEPT], one), 1), omega, torch.cat((weight, bias), 1)
    )
    kept = torch.cat((weight[:, KEPT], bias), 1)
    found = refit_bias(kept, wanted, gram)
    mean = (omega**2) @ x / (omega**2).sum()  # (6,) weighted by ω²
    assert torch.equal(found[:, :-1], weight[:, KEPT])  # nothing else is updated
    assert torch.allclose(found[:, -1], bias[:, 0] + weight[:, GONE] @ mean[GONE])
    assert torch.equal(refit_bias(kept, wanted[:, -1:], gram[:, -1:]), found)  # the last columns are all it needs


def test_held_out_rows_choose_the_damping():
    x, disturbed, omega, weight = case()
    kept, full = weight[:, KEPT], (x, disturbed, omega, weight)
    fit = Products(*reversed(products(*full)), 0.0)
    held_out = case(rows=200, seed=7)
    check = Products(*reversed(products(*held_out[:3], weight)), 0.0)
    settings = ReconstructSettings(damping=(0.3, 1e-4, 10.0))
    found, damping, gain = choose(settings, kept, fit, check, 4)
    errors = {
        value: output_error(refit_weight(kept, fit.wanted, fit.gram, value, 4), check.wanted, check.gram)
        for value in settings.damping
    }
    errors[NEVER] = output_error(kept, check.wanted, check.gram)
    assert damping == min(errors, key=errors.get)
    assert gain == pytest.approx(min(errors.values()) - errors[NEVER])
    assert torch.allclose(found, refit_weight(kept, fit.wanted, fit.gram, damping, 4))


@pytest.mark.parametrize("mode", ["least-squares", "bias"])
def test_fp32_sums_are_refitted_to_as_their_fp64_copies(mode):
    sums = [Products(*(each.float() for each in reversed(products(*case()))), 0.0) for _ in range(2)]
    copies = [Products(each.gram.double(), each.wanted.double(), 0.0) for each in sums]
    held = [(each.gram.clone(), each.wanted.clone()) for each in sums]
    kept, settings = case()[3][:, KEPT], ReconstructSettings(mode=mode)
    found, *rest = choose(settings, kept, *sums, 4)
    expected, *more = choose(settings, kept, *copies, 4)
    assert found.dtype == torch.float64 and torch.equal(found, expected) and rest == more and rest[1] < 0
    for each, before in zip(sums + copies, held + held):  # nothing is changed in place
        assert torch.equal(each.gram.float(), before[0]) and torch.equal(each.wanted.float(), before[1])


@pytest.mark.parametrize("mode", ["least-squares", "bias"])
def test_a_refit_that_held_out_rows_reject_is_not_made(mode):
    fit = Products(*reversed(products(*case())), 0.0)
    kept = case()[3][:, KEPT]
    perfect = Products(torch.eye(4).double(), kept.clone(), 0.0)  # held-out rows want what is there already
    found, damping, gain = choose(ReconstructSettings(mode=mode), kept, fit, perfect, 4)
    assert found is kept and damping == NEVER and gain == 0.0
