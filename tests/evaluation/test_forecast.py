"""Forecasts of samples that were not run: by hand, against refits, and how honest their errors are."""

import pytest
import torch

from structprune.evaluation.forecast import RIDGE, Completed, TokenModel, complete, surroundings
from structprune.evaluation.perturb import FORMS, draw_uniform


def masks(*rows: str) -> torch.Tensor:
    return torch.tensor([[sign == "M" for sign in row] for row in rows])


def test_surroundings_by_hand():
    """Of M.M a share of 2/3 is masked and 1/3 revealed; the middle one is revealed."""
    result = surroundings(masks("M.M", "MMM"))
    assert result.shape == (2, 3, 4) and result.dtype == torch.float64
    third = 1 / 3
    expected = [
        [[1, 1 / 6, 0, 2 * third], [1, 1 / 6, -third, -third], [1, 1 / 6, 2 * third, 0]],
        [[1, 0.5, 0, 0], [1, 0.5, 0, 0], [1, 0.5, 0, 0]],
    ]
    assert torch.allclose(result, torch.tensor(expected, dtype=torch.float64))


def ridge(features: torch.Tensor, target: torch.Tensor, penalty: float) -> torch.Tensor:
    """Coefficients by least squares on rows to which the prior's are added."""
    count = features.shape[1]
    rows = torch.cat((features, penalty**0.5 * torch.eye(count, dtype=torch.float64)))
    return torch.linalg.lstsq(rows, torch.cat((target, target.new_zeros(count)))).solution


def lines_by_hand(features: torch.Tensor, nats: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """(L, F) the line of all tokens plus each token's own."""
    shared = ridge(features[used], nats[used], RIDGE)
    rest = nats - features @ shared
    return torch.stack([shared + ridge(features[u, i], rest[u, i], RIDGE) for i, u in enumerate(used.T)])


def test_forecasts_are_two_ridge_regressions_and_leave_out_by_refitting():
    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(9, 5, generator=generator) < 0.6
    nats = torch.rand(9, 5, generator=generator, dtype=torch.float64)
    fitted = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 0]).bool()
    model = TokenModel(masked, nats, fitted)
    features, used = surroundings(masked), masked & fitted[:, None]
    lines = lines_by_hand(features, nats, used)
    assert torch.allclose(model.predicted, (features * lines).sum(-1))
    direction = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    gained = model.gained(direction)
    for sample in range(9):
        without = lines_by_hand(features, nats, used & (torch.arange(9) != sample)[:, None])
        assert gained[sample].item() == pytest.approx((direction * (lines - without)).sum().item(), abs=1e-12)
        expected = (features[sample] * without).sum(-1)
        assert torch.allclose(model.left_out[sample][used[sample]], expected[used[sample]])
    assert (gained[fitted].abs() > 1e-3).all() and (gained[~fitted].abs() < 1e-12).all()


def test_masks_that_were_run_are_known_and_learned_from_once():
    masked = masks("M..", ".M.", "MM.", "M..", "M..", ".M.", "..M")
    weight = torch.tensor([3, 3, 1.5, 3, 3, 3, 3]).double()
    nats = torch.tensor([[3, 0, 0], [0, 5, 0], [4, 9, 0], [3, 0, 0]]).double()
    result = complete(masked, weight, nats, run=4)
    assert result.repeats.tolist() == [0] * 6 + [1] and result.fresh.tolist() == [True, True, True, False]
    assert result.values[:6].tolist() == [9, 15, 19.5, 9, 9, 15]
    once = [0, 1, 2, 4, 5, 6]  # without the repetition among those run
    other = complete(masked[once], weight[once], nats[:3], run=3)
    assert result.residuals[:3].tolist() == pytest.approx(other.residuals.tolist())
    assert result.residuals[3] == result.residuals[0] and abs(result.residuals[0]) > 0.1
    model = TokenModel(masked, torch.cat((nats, torch.zeros(3, 3))), torch.arange(7) < 3)
    correction = result.residuals[:3].mean().item()
    assert result.values[6].item() == pytest.approx(3 * model.predicted[6, 2].item() + correction)
    assert result.residuals[2].item() == pytest.approx(1.5 * (13 - model.left_out[2, :2].sum().item()))


def test_all_run_leaves_nothing_to_forecast():
    masked = masks("M.", ".M", "MM", "..")  # Dream may mask nothing
    nats = torch.tensor([[1, 0], [0, 2], [3, 4], [0, 0]]).double()
    result = complete(masked, torch.ones(4).double(), nats, run=4)
    assert not result.repeats.any() and result.values.tolist() == [1, 2, 7, 0] and result.error() == 0


def test_samples_without_a_mask_are_known_and_say_nothing():
    """Dream's, run or not: 0, and forecasts are as without them."""
    masked = masks("...", "M..", ".M.", "...", "MMM", "...")
    weight = torch.tensor([1000, 4, 2, 9, 1, 9]).double()
    nats = torch.tensor([[0, 0, 0], [3, 0, 0], [0, 5, 0]]).double()
    result = complete(masked, weight, nats, run=3)
    assert result.fresh.tolist() == [False, True, True] and result.repeats.tolist() == [0, 0, 0, 0, 1, 0]
    assert result.values.tolist()[:4] == [0, 12, 10, 0] and result.values[5] == 0
    alone = complete(masked[[1, 2, 4]], weight[[1, 2, 4]], nats[1:], run=2)
    assert result.values[4].item() == pytest.approx(alone.values[2].item())
    assert result.error() * 6 == pytest.approx(alone.error() * 3)
    unseen = complete(masked[1:], weight[1:], nats[1:], run=2)  # an empty one is not forecast either
    assert unseen.values[2] == 0 and unseen.error() * 5 == pytest.approx(alone.error() * 3)
    nothing = complete(masked, weight, nats[:1], run=1)
    assert nothing.values.isfinite().all() and nothing.error() == float("inf")


def test_an_answer_that_is_known_adds_nothing_to_a_gap():
    result = complete(
        masks("M.", ".M", "MM", "M.", ".."),
        torch.ones(5).double(),
        torch.tensor([[1, 0], [0, 1], [2, 3]]).double(),
        run=3,
    )
    assert result.values.tolist() == [1, 1, 5, 1, 0] and not result.fresh.any() and not result.repeats.any()
    assert not result.residuals.any() and not result.influence.any() and len(result.residuals) == 3


def test_error_by_hand():
    """Three of six missing, two of them of one mask, so that 1 + 2 + 2 err; of five samples four count, whose residuals
    vary by 4/3 and whose influences' squares sum to 8: √(5 · 4/3 + 3/4 · 8) / 6."""
    values, repeats = torch.zeros(6).double(), torch.tensor([0, 0, 0, 1, 2, 2])
    residuals, influence = torch.tensor([[1, -1, 9, 1, -1], [2, 0, 7, -2, 0]]).double()
    fresh = torch.tensor([1, 1, 0, 1, 1]).bool()
    assert Completed(values, repeats, residuals, influence, fresh).error() == pytest.approx((20 / 3 + 6) ** 0.5 / 6)
    assert Completed(values, repeats, residuals, influence, torch.arange(5) == 2).error() == float("inf")
    assert Completed(values, 0 * repeats, residuals, influence, fresh).error() == 0


def test_influence_by_hand():
    """Of three samples run: the sum of forecasts, less that of as many like those run, with each and without."""
    masked = masks("M..", ".M.", "MM.", "..M", ".MM")
    weight, nats = torch.tensor([3, 3, 1.5, 3, 1.5]).double(), torch.tensor([[3, 0, 0], [0, 5, 0], [4, 9, 0]]).double()
    result = complete(masked, weight, nats, run=3)
    features, known = surroundings(masked), torch.cat((nats, torch.zeros(2, 3)))
    used = masked & (torch.arange(5) < 3)[:, None]
    sums = torch.einsum("nlf,nl->nlf", features, masked * weight[:, None])  # (N, L, F)
    direction = sums[3:].sum(0) - 2 / 3 * sums[:3].sum(0)  # (L, F)
    centred = result.residuals - result.residuals.mean()
    for sample in range(3):
        without = lines_by_hand(features, known, used & (torch.arange(5) != sample)[:, None])
        gained = (direction * (lines_by_hand(features, known, used) - without)).sum()
        assert result.influence[sample].item() == pytest.approx((gained + centred[sample] * 2 / 2).item())


def test_repeated_forecasts_are_counted():
    masked = masks("M..", ".M.", "MM.", ".MM", ".MM", "M.M")
    result = complete(masked, torch.ones(6).double(), torch.tensor([[3, 0, 0], [0, 5, 0]]).double(), run=2)
    assert result.repeats.tolist() == [0, 0, 1, 2, 2, 1]


@pytest.mark.parametrize("length", [4, 12, 30])
def test_a_linear_world_is_forecast_exactly_and_a_noisy_one_within_its_errors(length):
    """Nats that follow the features leave no residual; with noise, errors are what is stated and beat plain means."""
    generator = torch.Generator().manual_seed(1)
    stated, made, plain = [], [], []
    for noise in [0.0] + [0.5] * 200:
        levels, positions = draw_uniform(FORMS["fixed_count"], 64, 8, length, "stratified", generator)
        samples = FORMS["fixed_count"].perturb(levels, positions)
        line = torch.tensor([2, 1, -0.5, -0.3]).double()
        own = torch.randn(length, generator=generator).double() if noise else torch.zeros(length).double()  # (L,)
        nats = surroundings(samples.masked) @ line + own  # (N, L)
        of_mask = torch.randn(64, length, generator=generator)[samples.masked.unique(dim=0, return_inverse=True)[1]]
        nats = (nats + noise * of_mask) * samples.masked  # (N, L)
        values = nats.sum(1) * samples.weight  # (N,)
        result = complete(samples.masked, samples.weight, nats[:24], run=24)
        miss = (result.values.mean() - values.mean()).item()
        if not noise:
            assert abs(miss) < 0.1 and result.error() < 0.1 < values.std() / 8  # the prior pulls a little
            continue
        stated.append(result.error() ** 2)
        made.append(miss**2)
        plain.append((values[:24].mean() - values.mean()).item() ** 2)
    assert 0.5 * sum(stated) < sum(made) < 1.2 * sum(stated)  # of few tokens they are stated too large
    assert sum(made) < 0.5 * sum(plain)
