"""The refit under a mask against explicit least squares, row by row."""

from dataclasses import replace

import pytest
import torch

from structprune.refit import masked as refit
from structprune.refit.masked import Stop, choose_refit, refit_rows, share_rows
from structprune.refit.products import UNCHANGED, Products, output_error
from structprune.workers import ALONE
from tests.crowd import crowd

EXACT = {"stop": Stop(1e-14), "dtype": torch.float64}
CANDIDATES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


def case(outputs: int = 9, columns: int = 12, rows: int = 60, seed: int = 0):
    """Dense inputs x and a disturbed prefix's (R, C), row weights (R,), W (O, C), and a mask (O, C); all fp64.

    Rows keep other numbers of inputs each; the first keeps none, the second all.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double()

    x = draw(rows, columns) @ (torch.eye(columns) + 0.5 * draw(columns, columns)) + 0.5
    share = torch.linspace(0.2, 0.9, outputs)[:, None]
    keep = torch.rand(outputs, columns, generator=generator) < share
    keep[0], keep[1] = False, True
    return x, x + 0.1 * draw(rows, columns), draw(rows).abs(), draw(outputs, columns), keep


def products(x, hat, omega, weight) -> Products:
    """G, W·C and the power of the target output over rows weighted by ω²."""
    weighted = hat * omega[:, None] ** 2
    power = ((x @ weight.T) * omega[:, None]).pow(2).sum().item()
    return Products(hat.T @ weighted, weight @ x.T @ weighted, power)


def refitted(weight, keep, sums, damping, **options):
    """The refit at one damping, (O, C)."""
    return refit_rows(weight, keep, sums, (damping,), **options)[0]


def explicit(x, hat, omega, dense, start, keep, damping):
    """Row by row the minimiser over kept inputs of ‖ω(X̂w - Xw_dense)‖² + λ‖w - w_start‖², by `lstsq`.

    λ is `damping` times the mean power of the row's kept inputs.
    """
    moved = torch.zeros_like(start)
    for row, columns in enumerate(keep):
        count = int(columns.sum())
        if count:
            penalty = damping * (omega[:, None] * hat[:, columns]).pow(2).sum(0).mean()
            left = torch.cat((omega[:, None] * hat[:, columns], penalty**0.5 * torch.eye(count).double()))
            right = torch.cat((omega * (x @ dense[row]), penalty**0.5 * start[row, columns]))
            moved[row, columns] = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    return moved


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1, 3.0])
def test_rows_are_the_explicit_minimisers(damping):
    x, hat, omega, weight, keep = case()
    start = weight * keep * 1.1  # as after an update of what is left
    sums = products(x, hat, omega, weight)
    before = start.clone()
    moved = refitted(start, keep, sums, damping, **EXACT)
    expected = explicit(x, hat, omega, weight, start, keep, damping)
    assert torch.allclose(moved, expected, rtol=1e-7, atol=1e-9)
    usual = refitted(start, keep, sums, damping)  # in fp32
    assert usual.dtype == torch.float64 and (usual - expected).norm() < 2e-3 * (expected - start).norm()
    assert usual[~keep].eq(0).all() and usual[0].eq(0).all()
    assert moved[~keep].eq(0).all() and moved[0].eq(0).all()
    assert torch.equal(start, before)


def test_the_gradient_vanishes_on_kept_inputs_of_wide_rows():
    x, hat, omega, weight, keep = case(outputs=40, columns=70, rows=90)
    sums = products(x, hat, omega, weight)
    moved = refitted(weight * keep, keep, sums, 0.02, **EXACT)
    mean = (sums.gram.diagonal() * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)  # (O, 1)
    penalty = 0.02 * mean
    gradient = moved @ sums.gram - sums.target + penalty * (moved - weight * keep)
    assert gradient[keep].abs().max() < 1e-8 * gradient.abs().max()
    assert gradient[~keep].abs().max() > 1


def test_conjugate_gradients_by_hand():
    """Diagonal systems are solved by the first step, others of K inputs by the K-th; removed inputs stay out."""
    gram = torch.tensor([[2.0, 1.0, 5.0], [1.0, 3.0, 0.0], [5.0, 0.0, 20.0]]).double()
    keep = torch.tensor([[True, True, False], [False, False, True], [False, False, False], [True, False, True]])
    right = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.8, 0.0, 0.6]]).double()
    ridge = torch.tensor([[0.0], [5.0], [1.0], [1.0]]).double()
    moved = refit.conjugate_gradients(gram, right, keep, ridge, Stop(1e-12))
    fourth = torch.linalg.solve(torch.tensor([[3.0, 5.0], [5.0, 21.0]]).double(), torch.tensor([0.8, 0.6]).double())
    expected = [[(0.6 * 3 - 0.8) / 5, (0.8 * 2 - 0.6) / 5, 0], [0, 0, 1 / 25], [0, 0, 0], [fourth[0], 0, fourth[1]]]
    assert torch.allclose(moved, torch.tensor(expected).double(), atol=1e-14)


def test_too_few_steps_are_better_than_none(monkeypatch):
    x, hat, omega, weight, keep = case(outputs=20, columns=40, rows=90)
    start, sums = weight * keep, products(x, hat, omega, weight)
    errors = []
    for steps in (0, 1, 3, 9, 200):
        monkeypatch.setattr(refit, "STEPS", steps)
        moved = refitted(start, keep, sums, 0.0)
        errors.append(output_error(moved, sums.target, sums.gram))
    assert errors[0] == output_error(start, sums.target, sums.gram) and errors == sorted(errors, reverse=True)
    assert errors[3] - errors[4] < 0.05 * (errors[0] - errors[4])


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_size_of_inputs_does_not_matter(size):
    x, hat, omega, weight, keep = case()
    start, sums = weight * keep, products(x, hat, omega, weight)
    usual = refitted(start, keep, sums, 0.1)
    scaled = refitted(start, keep, Products(sums.gram * size, sums.target * size, sums.power), 0.1)
    assert torch.allclose(scaled, usual, rtol=1e-4, atol=1e-6) and not torch.equal(usual, start)


def test_infinite_damping_changes_nothing():
    x, hat, omega, weight, keep = case()
    sums = products(x, hat, omega, weight)
    assert choose_refit(weight, keep, sums, sums, (UNCHANGED,))[0] is weight
    start = weight * keep
    gaps = [(refitted(start, keep, sums, value) - start).norm() for value in (0.01, 1.0, 1e9)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-6


def test_too_few_tokens_for_the_inputs():
    x, hat, omega, weight, keep = case(rows=3)
    start, sums = weight * keep, products(x, hat, omega, weight)
    for damping in (0.0, 1e-3):
        moved = refitted(start, keep, sums, damping)
        gain = output_error(moved, sums.target, sums.gram) - output_error(start, sums.target, sums.gram)
        assert torch.isfinite(moved).all() and gain < 0
    shifted = sums.gram - 0.5 * sums.gram.diagonal().mean() * torch.eye(12)  # as no sum of squares is
    assert torch.isfinite(refitted(start, keep, Products(shifted, sums.target, sums.power), 0.0)).all()


def test_the_best_candidate_on_held_out_rows_is_taken():
    x, hat, omega, weight, keep = case(rows=326)
    fit = products(x[:26], hat[:26], omega[:26], weight)  # few tokens: little damping overfits, much does too little
    check = products(x[26:], hat[26:], omega[26:], weight)
    start = weight * keep
    tried = {value: refitted(start, keep, fit, value) for value in CANDIDATES}
    errors = {value: output_error(moved, check.target, check.gram) for value, moved in tried.items()}
    best = min(errors, key=errors.get)
    assert CANDIDATES[0] < best < CANDIDATES[-1]
    moved, damping, gain = choose_refit(start, keep, fit, check, CANDIDATES[::-1])
    assert damping == best and torch.equal(moved, tried[best])
    assert gain == pytest.approx(errors[best] - output_error(start, check.target, check.gram)) and gain < 0


@pytest.mark.parametrize("count, rows", [(2, [4, 5]), (10, [9] * 10)])
def test_processes_share_the_rows(monkeypatch, count, rows):
    """Where there are fewer rows than processes, each solves all."""
    x, hat, omega, weight, keep = case()
    start, sums = weight * keep, products(x, hat, omega, weight)
    alone = share_rows(start, keep, sums, (0.1, 1.0), ALONE)
    assert torch.equal(alone, refit_rows(start, keep, sums, (0.1, 1.0)))
    solved, solve = [], refit.refit_rows
    monkeypatch.setattr(refit, "refit_rows", lambda *given: solved.append(len(given[0])) or solve(*given))
    results = crowd(count, lambda workers: share_rows(start, keep, sums, (0.1, 1.0), workers))
    assert sorted(solved) == rows and all(torch.equal(each, results[0]) for each in results)
    assert torch.allclose(results[0], alone, atol=1e-6) and not torch.equal(alone[0], start)  # they stop together


def test_processes_stop_together():
    """Rows whose inputs are nearly orthogonal, in the first process, go on as long as those of the second."""
    generator = torch.Generator().manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(20, 20, generator=generator).double())[0] for _ in range(2)]
    spreads = (torch.linspace(1, 8, 20).double(), torch.logspace(0, 3, 20).double())
    gram = torch.block_diag(*(turn @ torch.diag(spread) @ turn.T for turn, spread in zip(turns, spreads)))
    keep = torch.zeros(8, 40, dtype=torch.bool)
    keep[:4, :20], keep[4:, 20:] = True, True
    sums = Products(gram, torch.randn(8, 40, generator=generator).double(), 1.0)
    start = torch.zeros(8, 40).double()
    alone = share_rows(start, keep, sums, (1e-6,), ALONE)
    results = crowd(2, lambda workers: share_rows(start, keep, sums, (1e-6,), workers))
    first = refit_rows(start[:4], keep[:4], replace(sums, target=sums.target[:4]), (1e-6,))  # stops by itself
    assert (first - alone[:, :4]).abs().max() > 1e-5  # so there is a difference to see
    assert all((each - alone).abs().max() < 1e-6 for each in results)


def test_held_out_rows_can_choose_either_end():
    x, hat, omega, weight, keep = case()
    start, sums = weight * keep, products(x, hat, omega, weight)
    assert choose_refit(start, keep, sums, sums, CANDIDATES)[1] == 0.001  # on the very rows that are fitted
    opposite = Products(sums.gram, 2 * start @ sums.gram - sums.target, sums.power)  # whose residual has the other sign
    moved, damping, gain = choose_refit(start, keep, sums, opposite, CANDIDATES)
    assert moved is start and damping == UNCHANGED and gain == 0


def test_no_candidate_that_can_be_solved_is_plain_removal():
    x, hat, omega, weight, keep = case()
    sums = products(x, hat, omega, weight)
    broken = Products(-sums.gram, sums.target, sums.power)
    moved, damping, gain = choose_refit(weight * keep, keep, broken, sums, CANDIDATES)
    assert torch.equal(moved, weight * keep) and damping == UNCHANGED and gain == 0


def test_rows_beyond_the_sample_are_refitted_too(monkeypatch):
    monkeypatch.setattr(refit, "SAMPLE", 3)
    x, hat, omega, weight, keep = case(outputs=20)
    start, sums = weight * keep, products(x, hat, omega, weight)
    sizes = []

    def count(weight, keep, sums, dampings):
        sizes.append((len(weight), len(dampings)))
        return refit_rows(weight, keep, sums, dampings)

    monkeypatch.setattr(refit, "refit_rows", count)
    moved, damping, gain = choose_refit(start, keep, sums, sums, CANDIDATES)
    assert sizes == [(3, len(CANDIDATES)), (20, 1)]
    assert torch.equal(moved, refitted(start, keep, sums, damping))
    error = ((moved @ hat.T - weight @ x.T) * omega).pow(2).sum() - ((start @ hat.T - weight @ x.T) * omega).pow(
        2
    ).sum()
    assert gain == pytest.approx(error.item())


def test_a_gain_on_the_sample_that_is_a_loss_on_all_rows_is_dropped(monkeypatch):
    monkeypatch.setattr(refit, "SAMPLE", 2)  # the first row and the last
    x, hat, omega, weight, _ = case(outputs=12)
    keep = torch.ones(12, 12, dtype=torch.bool)
    keep[:, ::2] = False
    start, sums = weight * keep, products(x, hat, omega, weight)
    target = 2 * start @ sums.gram - sums.target
    target[[0, -1]] = sums.target[[0, -1]]  # held-out rows agree with the fit there alone
    moved, damping, gain = choose_refit(start, keep, sums, Products(sums.gram, target, sums.power), CANDIDATES)
    assert moved is start and damping == UNCHANGED and gain == 0


def test_rounding_is_no_gain():
    x, _, omega, weight, _ = case()
    keep = torch.ones_like(weight, dtype=torch.bool)
    sums = products(x, x, omega, weight)  # nothing removed and nothing disturbed
    noise = 1e-7 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * sums.target.abs().mean()
    rounded = Products(sums.gram, sums.target + noise, sums.power)
    moved, damping, gain = choose_refit(weight, keep, rounded, rounded, CANDIDATES)
    assert moved is weight and damping == UNCHANGED and gain == 0


def test_several_dampings_at_once_are_what_each_is_alone(monkeypatch):
    """Also where one needs more steps: those that are there rest."""
    x, hat, omega, weight, keep = case(outputs=20, columns=40, rows=90)
    start, sums, dampings = weight * keep, products(x, hat, omega, weight), (10.0, 1.0, 0.001, 0.1)
    together = refit_rows(start, keep, sums, dampings, dtype=torch.float64)
    assert together.shape == (len(dampings), 20, 40)
    for damping, moved in zip(dampings, together):
        alone = refitted(start, keep, sums, damping, dtype=torch.float64)
        assert torch.allclose(moved, alone, rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(refit, "EVERY", refit.STEPS + 1)  # nobody rests before the last step
    longer = refit_rows(start, keep, sums, dampings, dtype=torch.float64)
    assert not torch.allclose(longer[1], together[1], rtol=1e-9, atol=1e-12)


def test_infinity_among_the_candidates_is_the_unchanged_weight():
    x, hat, omega, weight, keep = case()
    start, sums = weight * keep, products(x, hat, omega, weight)
    assert choose_refit(start, keep, sums, sums, (UNCHANGED,)) == (start, UNCHANGED, 0.0)
    moved = choose_refit(start, keep, sums, sums, (UNCHANGED, 0.1))
    assert moved[1] == 0.1 and torch.equal(moved[0], refitted(start, keep, sums, 0.1))


def test_one_damping_that_cannot_be_solved_spoils_no_other():
    x, hat, omega, weight, keep = case()
    start, sums = weight * keep, products(x, hat, omega, weight)
    shifted = sums.gram - 0.5 * sums.gram.diagonal().mean() * torch.eye(12)  # not positive definite without damping
    moved = refit_rows(start, keep, Products(shifted, sums.target, sums.power), (0.0, 3.0), dtype=torch.float64)
    alone = refitted(start, keep, Products(shifted, sums.target, sums.power), 3.0, dtype=torch.float64)
    assert moved.isfinite().all() and torch.allclose(moved[1], alone, rtol=1e-9, atol=1e-12)
