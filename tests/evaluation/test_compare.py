"""Paired differences by hand."""

import numpy as np
import pytest
import torch

from structprune.errors import UserError
from structprune.evaluation import compare
from structprune.evaluation.compare import (
    Comparison,
    average,
    conclude,
    paired_bootstrap,
    paired_difference,
    student_t,
)


def test_by_hand():
    result = paired_difference(torch.tensor([3.0, 5.0, 10.0]), torch.tensor([2.0, 3.0, 4.0]))  # gaps 1, 2, 6
    error = 7**0.5 / 3**0.5
    assert result["mean"] == 3 and result["standard_error"] == pytest.approx(error)
    assert (result["low"], result["high"]) == pytest.approx((3 - 1.96 * error, 3 + 1.96 * error))


def test_pairing_removes_what_both_share():
    shared = torch.tensor([0.0, 100.0, -50.0])
    result = paired_difference(shared + 1, shared)
    assert result == {"mean": 1, "standard_error": 0, "low": 1, "high": 1}


def test_one_pair_has_no_error():
    assert paired_difference(torch.tensor([2.0]), torch.tensor([0.5])) == {
        "mean": 1.5, "standard_error": None, "low": None, "high": None,
    }  # fmt: skip


def test_unequal_numbers_cannot_be_paired():
    with pytest.raises(RuntimeError):
        paired_difference(torch.ones(3), torch.ones(2))


def parts(values, below=None):
    below = below or [1.0] * len(values)
    return {str(index): pair for index, pair in enumerate(zip(map(float, values), map(float, below), strict=True))}


def test_equal_models_differ_by_exactly_nothing():
    values = [0.1 * index + 1 / 3 for index in range(50)]
    below = [1 + index % 7 for index in range(50)]
    for theirs in (parts(values), parts(values, below)):
        result = conclude(paired_bootstrap(dict(theirs), theirs, resamples=500), True)
        assert (result.difference, result.low, result.high) == (0, None, None)
        assert result.verdict == "no difference shown" and result.items == 50


def test_equal_models_of_a_few_items_too():
    result = conclude(paired_bootstrap(parts([2.5]), parts([2.5]), resamples=10), False)
    assert (result.difference, result.low, result.high, result.items) == (0, None, None, 1)


def test_a_constant_shift_is_certain_and_has_a_direction():
    theirs = [float(value) for value in range(12)]
    result = paired_bootstrap(parts([value + 2 for value in theirs]), parts(theirs), resamples=200)
    assert conclude(result, True) == Comparison(2, 2, 2, 12, 0, "better")
    assert conclude(result, False).verdict == "worse"
    below = paired_bootstrap(parts(theirs), parts([value + 2 for value in theirs]), resamples=200)
    assert conclude(below, True).verdict == "worse" and conclude(below, False).verdict == "better"


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios():
    ours, theirs = parts([4, 2], [1, 3]), parts([9, 1], [2, 2])  # 6/4 - 10/4; ratios' means differ by 7/3 - 5/2
    assert paired_bootstrap(ours, theirs, resamples=5).value == -1


def test_resamples_draw_whole_items():
    """Two items give three possible draws: AA, AB, BB, with chances 1/4, 1/2, 1/4."""
    ours, theirs = parts([4, 2], [1, 3]), parts([9, 1], [2, 2])
    result = paired_bootstrap(ours, theirs, resamples=4000).resampled
    values, counts = np.unique(result.round(12), return_counts=True)
    assert values == pytest.approx(sorted([4 / 1 - 9 / 2, 6 / 4 - 10 / 4, 2 / 3 - 1 / 2]))
    assert dict(zip(values.round(3), counts / 4000, strict=True)) == pytest.approx(
        {-1: 0.5, -0.5: 0.25, 0.167: 0.25}, abs=0.03
    )


def test_draws_without_a_denominator_are_no_draws():
    result = paired_bootstrap(parts([3, 0], [1, 0]), parts([1, 0], [1, 0]), resamples=400)
    assert result.value == 2 and set(result.resampled) == {2.0} and 250 < len(result.resampled) < 350  # 3/4 of them
    with pytest.raises(UserError, match="'t': shared items without a denominator"):
        paired_bootstrap(parts([3], [0]), parts([1], [1]), "t")


def test_paired_by_key_on_what_both_have():
    ours, theirs = {"a": (1.0, 1.0), "b": (0.0, 1.0), "c": (1.0, 1.0)}, {"b": (1.0, 1.0), "a": (1.0, 1.0)}
    result = paired_bootstrap(ours, theirs, resamples=10)
    assert (result.value, result.items, result.left_out) == (-0.5, 2, 1)
    with pytest.raises(UserError, match="task 'piqa': no item in common"):
        paired_bootstrap({"c": (1.0, 1.0)}, theirs, "piqa")


def test_five_items_show_nothing_and_six_may():
    for count, verdict in ((5, "no difference shown"), (6, "better")):
        result = conclude(paired_bootstrap(parts([1] * count), parts([0] * count), resamples=50), True)
        assert result.verdict == verdict and (result.low is None) == (count == 5)


def test_memory_is_bounded_and_does_not_change_the_law(monkeypatch):
    ours, theirs = parts(torch.randn(300, generator=torch.Generator().manual_seed(1)).tolist()), parts([0] * 300)
    whole = conclude(paired_bootstrap(ours, theirs, resamples=500), True)
    monkeypatch.setattr(compare, "CELLS", 1000)
    assert conclude(paired_bootstrap(ours, theirs, resamples=500), True) == whole


def test_a_task_has_a_stream_of_its_own_and_a_seed():
    ours, theirs = parts([1, 0, 0, 1, 1, 0, 2]), parts([0] * 7)
    one, again, other, reseeded = (
        paired_bootstrap(ours, theirs, task, seed, 100).resampled
        for task, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1))
    )
    assert (one == again).all() and (one != other).any() and (one != reseeded).any()


def test_the_average_over_tasks_by_hand():
    """Errors of independent tasks: the root of their summed squares over their number."""
    first = paired_bootstrap(parts([1, 0] * 200), parts([0] * 400), "a")
    second = paired_bootstrap(parts([0.5] * 20), parts([0.25] * 20), "b")
    result = average([first, second])
    assert (result.value, result.items, result.smallest) == (0.375, 420, 20)
    assert result.resampled.std() == pytest.approx(first.resampled.std() / 2, rel=1e-6)
    assert first.resampled.std() == pytest.approx(0.5 / 20, rel=0.03)
    independent = average([first, paired_bootstrap(parts([1, 0] * 200), parts([0] * 400), "b")])
    assert independent.resampled.std() == pytest.approx(first.resampled.std() / 2**0.5, rel=0.05)


def test_student_t_as_in_tables():
    for freedom, value in ((4, 2.776), (5, 2.571), (9, 2.262), (29, 2.045), (1000, 1.962)):
        assert student_t(freedom) == pytest.approx(value, rel=4e-3)


@pytest.mark.parametrize("count, draw", [(12, "normal"), (60, "right or wrong"), (40, "skewed")])
def test_intervals_hold_the_truth_as_often_as_they_say(count, draw):
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        shared = generator.normal(size=count)
        if draw == "normal":
            gap, truth = generator.normal(0.3, 1, count), 0.3
        elif draw == "skewed":
            gap, truth = generator.exponential(1, count), 1
        else:
            gap, truth = generator.choice([-1.0, 0.0, 1.0], count, p=[0.2, 0.5, 0.3]), 0.1
        result = conclude(paired_bootstrap(parts(shared + gap), parts(shared), resamples=400), True)
        held += result.low <= truth <= result.high
    assert 0.9 <= held / 300 <= 0.985


@pytest.mark.parametrize("differing, verdict", [(5, "no difference shown"), (6, "worse")])
def test_as_many_items_must_differ_as_a_sign_test_needs(differing, verdict):
    """Of 300 right or wrong, 5 to 0 is 2 / 2^5 = 6% by chance, 6 to 0 is 3%."""
    theirs = parts([1.0] * 300)
    ours = parts([0.0] * differing + [1.0] * (300 - differing))
    result = conclude(paired_bootstrap(ours, theirs, resamples=2000), True)
    assert result.verdict == verdict and (result.low is None) == (differing < 6)
