"""The refit in closed form against explicit least squares."""

import pytest
import torch

from structprune.config import ReconstructSettings
from structprune.refit import solve as solve_module
from structprune.refit.products import UNCHANGED, Products, output_error
from structprune.refit.solve import choose, refit_bias, refit_weight, target_gap
from tests.crowd import crowd

KEPT, REMOVED = [0, 2, 3, 5], [1, 4]


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


def refit(weight, target, gram, damping):
    """`refit_weight` of a layer with four features, and perhaps a constant."""
    return refit_weight(weight, target_gap(weight, target, gram), gram, damping, features=4)


def stacked(x, disturbed, omega, weight, penalty):
    """The minimiser of ‖W_new X̂ᵀ - W Xᵀ‖² + λ‖W_new - W_K‖² as one least-squares system."""
    left = torch.cat((omega[:, None] * disturbed, penalty**0.5 * torch.eye(disturbed.shape[1]).double()))
    right = torch.cat((omega[:, None] * x @ weight.T, penalty**0.5 * weight[:, KEPT].T))
    return torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("damping", [1e-3, 0.1, 3.0])
def test_refit_is_the_explicit_minimiser(damping):
    x, disturbed, omega, weight = case()
    target, gram = products(x, disturbed, omega, weight)
    moved = refit(weight[:, KEPT], target, gram, damping)
    penalty = damping * gram.diagonal().mean()
    assert torch.allclose(moved, stacked(x, disturbed, omega, weight, penalty), rtol=1e-8, atol=1e-10)


def test_growing_damping_falls_back_to_plain_removal():
    x, disturbed, omega, weight = case()
    target, gram = products(x, disturbed, omega, weight)
    plain = weight[:, KEPT]
    gaps = [(refit(plain, target, gram, damping) - plain).norm().item() for damping in (0.01, 1.0, 100.0, 1e8)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-6 < 1e-2 < gaps[0]
    assert torch.equal(refit(plain, target, gram, UNCHANGED), plain)


def test_no_damping_is_plain_least_squares_or_nothing():
    x, disturbed, omega, weight = case()
    moved = refit(weight[:, KEPT], *products(x, disturbed, omega, weight), 0.0)
    expected = torch.linalg.lstsq(omega[:, None] * disturbed, omega[:, None] * x @ weight.T).solution.T
    assert torch.allclose(moved, expected, rtol=1e-6)
    few = case(rows=3)  # fewer rows than kept channels: no unique minimum
    target, gram = products(*few)
    assert refit(few[3][:, KEPT], target, gram - 1e-6 * torch.eye(4), 0.0) is None


def test_a_constant_feature_does_not_move_the_damping():
    x, disturbed, omega, weight = case()
    one = torch.full((40, 1), 1000.0).double()  # its size shows whether it counts in the mean of the diagonal
    target, gram = products(x, torch.cat((disturbed, one), 1), omega, weight)
    plain = torch.cat((weight[:, KEPT], torch.zeros(3, 1)), 1)
    scale = gram.diagonal()[:4].mean()
    gap = (target - plain @ gram) @ torch.linalg.inv(gram + 0.1 * scale * torch.eye(5))
    assert torch.allclose(refit(plain, target, gram, 0.1), plain + gap, rtol=1e-6)


def test_output_error_is_the_error_less_the_target_power():
    x, disturbed, omega, weight = case()
    target, gram = products(x, disturbed, omega, weight)
    for candidate in (weight[:, KEPT], torch.zeros(3, 4).double(), refit(weight[:, KEPT], target, gram, 0.1)):
        gap = (disturbed @ candidate.T - x @ weight.T) * omega[:, None]
        power = ((x @ weight.T) * omega[:, None]).pow(2).sum()
        assert output_error(candidate, target, gram) == pytest.approx((gap.pow(2).sum() - power).item(), rel=1e-9)


def test_bias_mode_is_flaps_compensation():
    x, _, omega, weight = case()
    bias = torch.tensor([[0.5], [-1.0], [2.0]]).double()
    one = torch.ones(40, 1).double()
    target, gram = products(
        torch.cat((x, one), 1), torch.cat((x[:, KEPT], one), 1), omega, torch.cat((weight, bias), 1)
    )
    plain = torch.cat((weight[:, KEPT], bias), 1)
    moved = refit_bias(plain, target, gram)
    mean = (omega**2) @ x / (omega**2).sum()  # (6,) weighted by ω²
    assert torch.equal(moved[:, :-1], weight[:, KEPT])  # nothing else is updated
    assert torch.allclose(moved[:, -1], bias[:, 0] + weight[:, REMOVED] @ mean[REMOVED])
    assert torch.equal(refit_bias(plain, target[:, -1:], gram[:, -1:]), moved)  # the last columns are all it needs


def test_held_out_rows_choose_the_damping():
    x, disturbed, omega, weight = case()
    plain, full = weight[:, KEPT], (x, disturbed, omega, weight)
    fit = Products(*reversed(products(*full)), 0.0)
    held_out = case(rows=200, seed=7)
    check = Products(*reversed(products(*held_out[:3], weight)), 0.0)
    settings = ReconstructSettings(damping=(0.3, 1e-4, 10.0))
    moved, damping, gain = choose(settings, plain, fit, check, 4)
    errors = {
        value: output_error(refit(plain, fit.target, fit.gram, value), check.target, check.gram)
        for value in settings.damping
    }
    errors[UNCHANGED] = output_error(plain, check.target, check.gram)
    assert damping == min(errors, key=errors.get)
    assert gain == pytest.approx(min(errors.values()) - errors[UNCHANGED])
    assert torch.allclose(moved, refit(plain, fit.target, fit.gram, damping))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(
    "mode, dampings", [("least-squares", (0.3, 1e-4, 10.0)), ("least-squares", (0.3, 0.3)), ("bias", (0.3,))]
)
def test_processes_share_the_candidates(monkeypatch, mode, dampings, count):
    x, disturbed, omega, weight = case()
    fit = Products(*reversed(products(x, disturbed, omega, weight)), 0.0)
    check = Products(*reversed(products(*case(rows=200, seed=7)[:3], weight)), 0.0)
    settings = ReconstructSettings(damping=dampings, mode=mode)
    alone = choose(settings, weight[:, KEPT], fit, check, 4)
    solved, solve = [], solve_module.refit_weight
    monkeypatch.setattr(solve_module, "refit_weight", lambda *given: solved.append(given[3]) or solve(*given))
    for moved, *rest in crowd(count, lambda workers: choose(settings, weight[:, KEPT], fit, check, 4, workers)):
        assert torch.equal(moved, alone[0]) and rest == [*alone[1:]] and rest[1] < 0
    assert sorted(solved) == ([] if mode == "bias" else sorted(set(dampings)))  # each by one of them, once
    perfect = Products(torch.eye(4).double(), weight[:, KEPT].clone(), 0.0)  # held-out rows want what is there already
    for moved, *rest in crowd(count, lambda workers: choose(settings, weight[:, KEPT], fit, perfect, 4, workers)):
        assert torch.equal(moved, weight[:, KEPT]) and rest == [UNCHANGED, 0.0]


@pytest.mark.parametrize("mode", ["least-squares", "bias"])
def test_fp32_sums_are_refitted_to_as_their_fp64_copies(mode):
    sums = [Products(*(each.float() for each in reversed(products(*case()))), 0.0) for _ in range(2)]
    copies = [Products(each.gram.double(), each.target.double(), 0.0) for each in sums]
    held = [(each.gram.clone(), each.target.clone()) for each in sums]
    plain, settings = case()[3][:, KEPT], ReconstructSettings(mode=mode)
    moved, *rest = choose(settings, plain, *sums, 4)
    expected, *more = choose(settings, plain, *copies, 4)
    assert moved.dtype == torch.float64 and torch.equal(moved, expected) and rest == more and rest[1] < 0
    for each, before in zip(sums + copies, held + held):  # nothing is changed in place
        assert torch.equal(each.gram.float(), before[0]) and torch.equal(each.target.float(), before[1])


@pytest.mark.parametrize("mode", ["least-squares", "bias"])
def test_a_refit_that_held_out_rows_reject_is_not_made(mode):
    fit = Products(*reversed(products(*case())), 0.0)
    plain = case()[3][:, KEPT]
    perfect = Products(torch.eye(4).double(), plain.clone(), 0.0)  # held-out rows want what is there already
    moved, damping, gain = choose(ReconstructSettings(mode=mode), plain, fit, perfect, 4)
    assert moved is plain and damping == UNCHANGED and gain == 0.0


def test_a_gain_below_rounding_changes_nothing():
    """The output error falls by 0.25 of a target power of 1, or of one so large that fp32 sums cannot tell."""
    weight, gram = torch.tensor([[1.0]]).double(), torch.tensor([[1.0]])
    target = torch.tensor([[1.5]])  # W·C: the best weight is 1.5, which gains 0.25
    fit = Products(gram, target, float("nan"))
    settings = ReconstructSettings(damping=(1e-6,))
    chosen, damping, gain = choose(settings, weight, fit, Products(gram, target, 1.0), features=1)
    assert chosen.item() == pytest.approx(1.5, abs=1e-5) and damping == 1e-6 and gain == pytest.approx(-0.25)
    unchanged = choose(settings, weight, fit, Products(gram, target, 1e6), features=1)
    assert unchanged[0] is weight and unchanged[1:] == (UNCHANGED, 0.0)
