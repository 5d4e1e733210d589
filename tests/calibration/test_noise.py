"""The forward process: exact probabilities, mask rates, stratification, visible edges."""

import pytest
import torch

from structprune.calibration.noise import (
    check_copies,
    deal_levels,
    level_times,
    mask_rate,
    noise_windows,
    stratified_noise,
    stratified_times,
    window_times,
)
from structprune.errors import UserError

MASK = 999


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def windows(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, MASK, (count, length), generator=generator(7))


def times_of(p: torch.Tensor) -> torch.Tensor:
    return (p.double() - 1e-3) / (1 - 1e-3)


def test_levels_are_the_published_ones():
    _, p = noise_windows(windows(3, 8), MASK, "levels", generator(), level_times())
    expected = torch.tensor([0.999 * t + 0.001 for t in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)])
    assert p.dtype == torch.float32 and p.shape == (3, 10)
    torch.testing.assert_close(p, expected.expand(3, 10), rtol=0, atol=1e-7)
    assert level_times(7, 3).tolist() == [3 / 7, 6 / 7]
    assert mask_rate(torch.tensor([0.0, 1.0])).tolist() == [pytest.approx(1e-3), 1.0]


def test_mask_rate_follows_p_and_only_masked_positions_change():
    ids = windows(40, 500)
    noisy, p = noise_windows(ids, MASK, "levels", generator(), level_times(20, 4))
    assert noisy.dtype == torch.int64 and noisy.shape == (40, 5, 500)
    masked = noisy == MASK
    rate, deviation = masked.float().mean((0, 2)), (p[0] * (1 - p[0]) / 20_000).sqrt()
    assert ((rate - p[0]).abs() <= 4 * deviation).all()
    assert torch.equal(noisy[~masked], ids[:, None].expand_as(noisy)[~masked])
    assert masked[:, -1].all()  # p = 1 at t = 1


def test_masks_are_independent_over_copies_and_positions():
    noisy, p = noise_windows(windows(40, 500), MASK, "levels", generator(), level_times(2, 1))
    first = (noisy[:, 0] == MASK).double() - p[0, 0]
    neighbours = (first[:, 1:] * first[:, :-1]).mean()
    rows = (first[1:] * first[:-1]).mean()
    assert abs(neighbours) < 4 * 0.25 / 20_000**0.5 and abs(rows) < 4 * 0.25 / 20_000**0.5


def test_uniform_is_one_shift_per_copy():
    ids = windows(8, 16)
    _, p = noise_windows(ids, MASK, "uniform", generator(3), level_times(6, 2))
    t = times_of(p)
    assert p.shape == (8, 3)
    for copy in t.T:
        gaps = (copy - copy[0]) % 1
        expected = torch.arange(8).double() / 8
        distance = torch.minimum((gaps - expected) % 1, (expected - gaps) % 1)  # (8,) around the circle
        assert distance.max() < 1e-6
    assert len({round(value, 4) for value in t[0].tolist()}) == 3  # every copy has its own shift


def test_stratified_times_fill_every_stratum():
    for seed in range(20):
        t = stratified_times(13, generator(seed))
        assert sorted((t * 13).long().tolist()) == list(range(13))
    shifts = torch.tensor([stratified_times(4, generator(seed))[0] for seed in range(200)])
    assert 0.4 < shifts.mean() < 0.6 and shifts.min() < 0.05 and shifts.max() > 0.95


def test_evaluation_noise_is_stratified_over_all_draws_in_random_order():
    ids = windows(10, 400)
    noisy, p = stratified_noise(ids, MASK, generator(1), samples=5)
    assert noisy.shape == (10, 5, 400) and p.shape == (10, 5) and p.dtype == torch.float32
    strata = (times_of(p).flatten() * 50).long()
    assert sorted(strata.tolist()) == list(range(50))
    steps = strata.diff() % 50
    assert len(steps.unique()) > 10  # in the order drawn each would be 1
    rate = (noisy == MASK).float().mean(-1)
    assert ((rate - p).abs() <= 4.5 * (p * (1 - p) / 400).sqrt() + 1e-3).all()


@pytest.mark.parametrize(
    ("windows", "levels", "copies", "start", "expected"),
    [
        (5, 5, 1, 3, [[0], [1], [2], [3], [4]]),  # draws 0 .. 4 of 5: (5 i + start) // 5
        (3, 4, 2, 0, [[0, 2], [0, 2], [1, 3]]),  # draws 0 .. 5 of 6: 0 0 1 | 2 2 3
        (3, 4, 2, 3, [[0, 2], [1, 3], [1, 3]]),  # (4 i + 3) // 6: 0 1 1 | 2 3 3
        (2, 5, 3, 4, [[0, 2, 4], [1, 3, 4]]),  # (5 i + 4) // 6: 0 1 | 2 3 | 4 4, and level 4 in two windows
        (1, 10, 1, 7, [[7]]),
        (1, 10, 2, 7, [[3, 8]]),  # (10 i + 7) // 2: one in each half
        (2, 3, 3, 1, [[0, 1, 2], [0, 1, 2]]),
    ],
)
def test_deals_by_hand(windows, levels, copies, start, expected):
    seed = next(n for n in range(200) if torch.randint(levels, (1,), generator=generator(n)).item() == start)
    dealt = deal_levels(windows, levels, copies, generator(seed)).tolist()
    assert sorted(dealt) == expected


def test_deals_are_even_and_spread_over_every_window():
    for count in (1, 2, 3, 7, 12):
        for levels in range(1, 11):
            for copies in range(1, levels + 1):
                dealt = deal_levels(count, levels, copies, generator(count))  # (N, c)
                assert dealt.shape == (count, copies) and dealt.min() >= 0 and dealt.max() < levels
                occurrences = dealt.flatten().bincount(minlength=levels)
                assert occurrences.max() - occurrences.min() <= 1
                gaps = dealt.diff(dim=1)
                assert ((gaps >= levels // copies) & (gaps <= -(-levels // copies))).all()
    # no level is dealt more often than others on average: 3000 single draws of 3 levels, 5 standard deviations
    single = torch.cat([deal_levels(1, 3, 1, generator(seed)) for seed in range(3000)]).flatten()
    assert (single.bincount(minlength=3) - 1000).abs().max() < 130


def test_deals_are_shuffled_by_the_seed():
    one, two, other = (deal_levels(60, 10, 2, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert not torch.equal(one[:, 0], one[:, 0].sort().values)


def test_dealt_times_of_both_schedules():
    times = level_times(50, 5)
    levels = window_times(20, "levels", times, generator(1), copies=2)  # (N, c)
    assert levels.dtype == torch.float64 and sorted(levels.flatten().tolist()) == sorted(times.tolist() * 4)
    torch.testing.assert_close(levels[:, 1] - levels[:, 0], torch.full((20,), 0.5, dtype=torch.float64))
    assert torch.equal(window_times(20, "levels", times, generator(1), copies=10), times.expand(20, -1))
    uniform = window_times(20, "uniform", times, generator(1), copies=2)  # (N, c)
    # one in each of all 40 strata, and a window's two half the circle apart
    assert sorted((uniform * 40).long().flatten().tolist()) == list(range(40))
    torch.testing.assert_close((uniform[:, 1] - uniform[:, 0]) % 1, torch.full((20,), 0.5, dtype=torch.float64))
    assert not torch.equal(uniform, uniform.sort(0).values)
    for schedule in ("levels", "uniform"):
        assert window_times(0, schedule, times, generator(), copies=3).shape == (0, 3)


@pytest.mark.parametrize("draw", ["levels", "uniform", "evaluation"])
def test_edges_stay_visible_only_where_asked(draw):
    ids = windows(200, 6)
    for visible in (True, False):
        if draw == "evaluation":
            noisy, _ = stratified_noise(ids, MASK, generator(), samples=4, edges_visible=visible)
        else:
            noisy, _ = noise_windows(ids, MASK, draw, generator(), level_times(), edges_visible=visible)
        assert (noisy[..., 1:-1] == MASK).any()
        for edge in (0, -1):
            assert torch.equal(noisy[..., edge], ids[:, None, edge].expand(noisy.shape[:2])) == visible


@pytest.mark.parametrize("schedule", ["levels", "uniform"])
def test_the_seed_decides(schedule):
    ids = windows(4, 50)
    one, two, other = (noise_windows(ids, MASK, schedule, generator(seed), level_times())[0] for seed in (5, 5, 6))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_bad_requests():
    with pytest.raises(
        UserError, match=r"^calibration.interval = 60 leaves no noise level: choose 1 to calibration.steps = 50$"
    ):
        level_times(50, 60)
    with pytest.raises(
        UserError,
        match=r"^calibration.copies = 3 exceeds the number of noise levels, 2: lower it, or calibration.interval$",
    ):
        check_copies(3, 2)
    check_copies(2, 2)
    check_copies(None, 0)
    with pytest.raises(ValueError, match="not 'linear'"):
        noise_windows(windows(1, 4), MASK, "linear", generator(), level_times())
