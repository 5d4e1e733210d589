"""Tables of latencies: smoothing, interpolation and sums by hand."""

import json
from itertools import combinations

import numpy as np
import pytest

from structprune.levels.latency import (
    LatencyTarget,
    PartTimes,
    make_table,
    measured_steps,
    narrowest,
    never_rising,
    table_of,
)
from structprune.structured.sizes import BlockSize

HEADS = PartTimes("attention", (0, 1), 4, (0, 1, 3), (8.0, 7.0, 3.0))
TIMES = {
    ("attention", (0, 1), 4): {0: 8.0, 1: 7.0, 3: 3.0},
    ("channels", (0,), 64): {0: 6.0, 32: 3.0, 56: 4.0},
}


@pytest.mark.parametrize(
    "values, smooth",
    [
        ([5, 3, 1], [5, 3, 1]),
        ([5, 1, 3], [5, 2, 2]),
        ([1, 2, 6], [3, 3, 3]),
        ([4, 5, 1, 2, 3], [4.5, 4.5, 2, 2, 2]),
        ([3, 2, 4, 1], [3, 3, 3, 1]),
    ],
)
def test_smoothing_by_hand(values, smooth):
    assert never_rising(values) == pytest.approx(smooth)


def test_smoothing_is_the_nearest():
    """Against brute force: every way to cut the values into neighbours that share their mean."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        values = draw.normal(size=6)
        best = None
        for count in range(6):
            for cuts in combinations(range(1, 6), count):
                parts = np.split(values, cuts)
                guess = np.concatenate([np.full(len(part), part.mean()) for part in parts])
                error = float(((guess - values) ** 2).sum())
                if (np.diff(guess) <= 1e-12).all() and (best is None or error < best):
                    best = error
        smooth = np.array(never_rising(values.tolist()))
        assert (np.diff(smooth) <= 0).all() and ((smooth - values) ** 2).sum() == pytest.approx(best)


def test_between_measured_widths_time_is_linear():
    assert [HEADS.at(steps) for steps in range(5)] == [8, 7, 5, 3, 0]
    narrow = PartTimes("channels", (0,), 64, (0, 32, 56), (6.0, 4.0, 1.0))
    assert [narrow.at(steps) for steps in (16, 44, 60, 64)] == pytest.approx([5, 2.5, 1, 0])


def test_a_table_adds_up_to_the_dense_model():
    """Parts alone take 8 + 8 + 6 = 22 ms; the model takes 11 ms more than what no plan changes, so they are halved."""
    table = make_table(13.0, 2.0, TIMES, {"batch": 1})
    assert table.scale == 0.5 and table.total({}) == 13
    assert table.parts[1].ms == pytest.approx((3.0, 1.75, 1.75))  # 3 and 4 became their mean
    assert table.price((1, "attention"), 2) == 2.5 and table.price((0, "channels"), 16) == pytest.approx(2.375)
    counts = {(0, "attention"): 4, (0, "channels"): 56}
    assert table.total(counts) == pytest.approx(2 + 0 + 4 + 1.75)
    assert table_of(json.loads(json.dumps(table.plain()))) == table
    other = make_table(13.0, 2.0, TIMES, {"batch": 2})
    assert table.digest() == table_of(table.plain()).digest() != other.digest()


def test_what_a_target_leaves_for_some_parts():
    target = LatencyTarget(9.0, make_table(13.0, 2.0, TIMES, {}))
    # of the target, 2 ms are the rest's and 4 ms the other attention's, which may not shrink
    assert target.budget([(0, "attention"), (0, "channels")]) == pytest.approx(3.0)
    assert target.budget([(0, "attention"), (1, "attention"), (0, "channels")]) == pytest.approx(7.0)
    assert not target.met({}) and not target.met({(0, "channels"): 64})
    assert target.met({(0, "attention"): 4})  # 2 + 4 + 3 ms
    assert not target.met({(0, "attention"): 3, (0, "channels"): 32})  # 2 + 4 + 1.5 + 1.75 ms


@pytest.mark.parametrize("change", [{"removed": [0, 1]}, {"ms": []}, {"steps": "many"}, {"blocks": None}])
def test_what_is_no_table(change):
    plain = make_table(13.0, 2.0, TIMES, {}).plain()
    with pytest.raises((ValueError, TypeError)):
        table_of(plain | {"parts": [plain["parts"][0] | change]})


def test_widths_to_measure():
    size = BlockSize(0, 0, {}, {"attention": 4, "channels": 640}, {})
    assert measured_steps(size, "attention", 32) == (0, 1, 2, 3)
    steps = measured_steps(size, "channels", 32)
    assert len(steps) == 9 and steps[0] == 0 and steps[-1] == 608 and all(each % 32 == 0 for each in steps)
    wide = BlockSize(0, 0, {}, {"attention": 32, "channels": 48}, {})
    assert measured_steps(wide, "attention", 8) == (0, 4, 8, 12, 16, 19, 23, 27, 31)
    assert measured_steps(wide, "channels", 48) == (0,)  # one multiple: nothing narrower stays
    assert measured_steps(BlockSize(0, 0, {}, {"attention": 1}, {}), "attention", 8) == (0,)
    assert narrowest([wide], 8) == {(0, "attention"): 31, (0, "channels"): 40}
