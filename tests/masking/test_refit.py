"""The refit under a mask against explicit least squares, row by row."""

import pytest
import torch

from structprune.masking import refit
from structprune.masking.refit import choose_refit, refit_rows
from structprune.structured.reconstruct import NEVER, Products, output_error

CANDIDATES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


def case(outputs: int = 9, columns: int = 12, rows: int = 60, seed: int = 0):
    """Dense inputs x and a disturbed prefix's (R, C), row weights (R,), W (O, C), and kept (O, C); all fp64.

    Rows keep other numbers of inputs each; the first keeps none, the second all.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double()

    x = draw(rows, columns) @ (torch.eye(columns) + 0.5 * draw(columns, columns)) + 0.5
    share = torch.linspace(0.2, 0.9, outputs)[:, None]
    kept = torch.rand(outputs, columns, generator=generator) < share
    kept[0], kept[1] = False, True
    return x, x + 0.1 * draw(rows, columns), draw(rows).abs(), draw(outputs, columns), kept


def products(x, hat, omega, weight) -> Products:
    """G, W·C and the power of the wanted output over rows weighted by ω²."""
    weighted = hat * omega[:, None] ** 2
    power = ((x @ weight.T) * omega[:, None]).pow(2).sum().item()
    return Products(hat.T @ weighted, weight @ x.T @ weighted, power)


def explicit(x, hat, omega, dense, start, kept, damping):
    """Row by row the minimiser over kept inputs of ‖ω(X̂w - Xw_dense)‖² + λ‖w - w_start‖², by `lstsq`.

    λ is `damping` times the mean power of the row's kept inputs.
    """
    found = torch.zeros_like(start)
    for row, columns in enumerate(kept):
        count = int(columns.sum())
        if count:
            penalty = damping * (omega[:, None] * hat[:, columns]).pow(2).sum(0).mean()
            left = torch.cat((omega[:, None] * hat[:, columns], penalty**0.5 * torch.eye(count).double()))
            right = torch.cat((omega * (x @ dense[row]), penalty**0.5 * start[row, columns]))
            found[row, columns] = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    return found


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("limit", [1, 3000, 2**28], ids=["one row", "some rows", "all rows"])
def test_rows_are_the_explicit_minimisers(damping, limit, monkeypatch):
    monkeypatch.setattr(refit, "SOLVE_BYTES", limit)
    x, hat, omega, weight, kept = case()
    start = weight * kept * 1.1  # as after an update of what is left
    sums = products(x, hat, omega, weight)
    before = start.clone()
    found = refit_rows(start, kept, sums.wanted, sums.gram, damping)
    assert torch.allclose(found, explicit(x, hat, omega, weight, start, kept, damping), rtol=1e-8, atol=1e-10)
    assert found[~kept].eq(0).all() and found[0].eq(0).all()
    assert torch.equal(start, before)


def test_the_gradient_vanishes_on_kept_inputs_of_wide_rows():
    x, hat, omega, weight, kept = case(outputs=40, columns=70, rows=90)
    sums = products(x, hat, omega, weight)
    found = refit_rows(weight * kept, kept, sums.wanted, sums.gram, 0.02)
    mean = (sums.gram.diagonal() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)  # (O, 1)
    penalty = 0.02 * mean
    gradient = found @ sums.gram - sums.wanted + penalty * (found - weight * kept)
    assert gradient[kept].abs().max() < 1e-9 * gradient.abs().max()
    assert gradient[~kept].abs().max() > 1


def test_how_many_rows_are_solved_at_once(monkeypatch):
    counts = torch.tensor([3, 0, 2, 5, 1, 2])
    order = torch.tensor([1, 4, 2, 5, 0, 3])
    found = {}
    for limit in (0, 8, 100, 150, 400, 2000):
        monkeypatch.setattr(refit, "SOLVE_BYTES", limit)
        found[limit] = refit._fitting(order, counts, 8).tolist()
    # n rows up to one that keeps K need n · K² · 8 bytes: 0, 16, 96, 128, 360, 1200
    assert [len(rows) for rows in found.values()] == [1, 1, 3, 4, 5, 6]
    assert found[100] == [1, 4, 2]


def test_infinite_damping_changes_nothing():
    x, hat, omega, weight, kept = case()
    sums = products(x, hat, omega, weight)
    assert refit_rows(weight, kept, sums.wanted, sums.gram, NEVER) is weight
    start = weight * kept
    gaps = [(refit_rows(start, kept, sums.wanted, sums.gram, value) - start).norm() for value in (0.01, 1.0, 1e9)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-6


def test_too_few_tokens_need_damping():
    x, hat, omega, weight, kept = case(rows=3)
    sums = products(x, hat, omega, weight)
    assert refit_rows(weight * kept, kept, -sums.wanted, sums.gram - 1e-9 * torch.eye(12), 0.0) is None
    assert torch.isfinite(refit_rows(weight * kept, kept, sums.wanted, sums.gram, 1e-3)).all()


def test_the_best_candidate_on_held_out_rows_is_taken():
    x, hat, omega, weight, kept = case(rows=326)
    fit = products(x[:26], hat[:26], omega[:26], weight)  # few tokens: little damping overfits, much does too little
    check = products(x[26:], hat[26:], omega[26:], weight)
    start = weight * kept
    tried = {value: refit_rows(start, kept, fit.wanted, fit.gram, value) for value in CANDIDATES}
    errors = {value: output_error(found, check.wanted, check.gram) for value, found in tried.items()}
    best = min(errors, key=errors.get)
    assert CANDIDATES[0] < best < CANDIDATES[-1]
    found, damping, gain = choose_refit(start, kept, fit, check, CANDIDATES[::-1])
    assert damping == best and torch.equal(found, tried[best])
    assert gain == pytest.approx(errors[best] - output_error(start, check.wanted, check.gram)) and gain < 0


def test_held_out_rows_can_choose_either_end():
    x, hat, omega, weight, kept = case()
    start, sums = weight * kept, products(x, hat, omega, weight)
    assert choose_refit(start, kept, sums, sums, CANDIDATES)[1] == 0.001  # on the very rows that are fitted
    opposite = Products(sums.gram, 2 * start @ sums.gram - sums.wanted, sums.power)  # whose residual has the other sign
    found, damping, gain = choose_refit(start, kept, sums, opposite, CANDIDATES)
    assert found is start and damping == NEVER and gain == 0


def test_no_candidate_that_can_be_solved_is_plain_removal():
    x, hat, omega, weight, kept = case()
    sums = products(x, hat, omega, weight)
    broken = Products(-sums.gram, sums.wanted, sums.power)
    found, damping, gain = choose_refit(weight * kept, kept, broken, sums, CANDIDATES)
    assert torch.equal(found, weight * kept) and damping == NEVER and gain == 0


def test_rows_beyond_the_sample_are_refitted_too(monkeypatch):
    monkeypatch.setattr(refit, "SAMPLE", 3)
    x, hat, omega, weight, kept = case(outputs=20)
    start, sums = weight * kept, products(x, hat, omega, weight)
    seen, real = [], refit.refit_rows
    monkeypatch.setattr(refit, "refit_rows", lambda *given: seen.append(len(given[0])) or real(*given))
    found, damping, gain = choose_refit(start, kept, sums, sums, CANDIDATES)
    assert seen == [3] * len(CANDIDATES) + [20]
    assert torch.equal(found, real(start, kept, sums.wanted, sums.gram, damping))
    error = ((found @ hat.T - weight @ x.T) * omega).pow(2).sum() - ((start @ hat.T - weight @ x.T) * omega).pow(
        2
    ).sum()
    assert gain == pytest.approx(error.item())


def test_a_gain_on_the_sample_that_is_a_loss_on_all_rows_is_dropped(monkeypatch):
    monkeypatch.setattr(refit, "SAMPLE", 2)  # the first row and the last
    x, hat, omega, weight, _ = case(outputs=12)
    kept = torch.ones(12, 12, dtype=torch.bool)
    kept[:, ::2] = False
    start, sums = weight * kept, products(x, hat, omega, weight)
    wanted = 2 * start @ sums.gram - sums.wanted
    wanted[[0, -1]] = sums.wanted[[0, -1]]  # held-out rows agree with the fit there alone
    found, damping, gain = choose_refit(start, kept, sums, Products(sums.gram, wanted, sums.power), CANDIDATES)
    assert found is start and damping == NEVER and gain == 0


def test_rounding_is_no_gain():
    x, _, omega, weight, _ = case()
    kept = torch.ones_like(weight, dtype=torch.bool)
    sums = products(x, x, omega, weight)  # nothing removed and nothing disturbed
    noise = 1e-7 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * sums.wanted.abs().mean()
    rounded = Products(sums.gram, sums.wanted + noise, sums.power)
    found, damping, gain = choose_refit(weight, kept, rounded, rounded, CANDIDATES)
    assert found is weight and damping == NEVER and gain == 0
