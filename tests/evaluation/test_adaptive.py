"""When a choice is decided, by hand, and how often that is wrong."""

from dataclasses import replace

import pytest
import torch

from structprune.evaluation.adaptive import decided, look_schedule, student_tail
from structprune.evaluation.forecast import Completed, complete

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "blocks, rows, looks",
    [
        (1, 8, [1]), (2, 8, [2]), (3, 8, [2, 3]), (16, 8, [*range(2, 17)]), (22, 8, [*range(2, 17), 18, 20, 22]),
        (5, 5, [4, 5]), (3, 1, [3]), (20, 1, [16, 18, 20]), (3, 64, [2, 3]),
    ],
)  # fmt: skip
def test_looks(blocks, rows, looks):
    """The first after two blocks and sixteen samples, where there are as many."""
    assert look_schedule(blocks, rows) == looks


@pytest.mark.parametrize(
    "t, freedom, tail",
    [
        (0, 1, 0.5), (0, 6, 0.5), (1, 1, 0.25), (12.706, 1, 0.025), (4.3027, 2, 0.025), (2.3534, 3, 0.05),
        (4.6041, 4, 0.005), (2.2281, 10, 0.025), (2.13145, 15, 0.025), (1e9, 4, 0), (63.657, 1, 0.005),
    ],
)  # fmt: skip
def test_tail_of_students_t_as_in_tables(t, freedom, tail):
    assert student_tail(t, freedom) == pytest.approx(tail, abs=2e-6)


ONE = torch.ones(2, dtype=torch.float64)


def answer(values, residuals, missing: int, fresh: int | None = None) -> Completed:
    """Of values (N,) the last `missing` are forecasts, which samples influence by their residuals; the first `fresh` of
    these (default all) count."""
    values, residuals = (torch.tensor(part, dtype=torch.float64) for part in (values, residuals))
    repeats = (torch.arange(len(values)) >= len(values) - missing).long()
    counted = torch.arange(len(residuals)) < (len(residuals) if fresh is None else fresh)
    return Completed(values, repeats, residuals, missing * residuals, counted)


def test_decided_by_hand():
    """A mean gap of 4; residuals ±1 against 0 vary by 2, influences are ±2, so with two of four missing the error is
    √(2 · 2 + 8 / 2) / 4 = 0.7071 and t = 5.657 of 1 degree: a tail of 1/2 - arctan(5.657)/π = 0.0557. The error
    allowed is shared by 1 other answer and 2 senses: 0.1114."""
    ahead, behind = answer([10, 20, 15, 15], [1, -1], 2), answer([13, 25, 19, 19], [0, 0], 2)
    assert decided([ahead, behind], ONE, confidence=1 - 0.113)
    assert not decided([ahead, behind], ONE, confidence=1 - 0.110)
    # a third answer far behind shares the error: 0.2228
    three, ones = [ahead, behind, answer([900, 910, 905, 905], [0, 0], 2)], torch.ones(3, dtype=torch.float64)
    assert decided(three, ones, confidence=1 - 0.224)
    assert not decided(three, ones, confidence=1 - 0.221)
    # what is unknown of either answer counts, and so does a residual that is fresh in either
    known = answer([13, 25, 19, 19], [0, 0], 0, fresh=0)
    assert decided([ahead, known], ONE, confidence=1 - 0.113) and not decided([ahead, known], ONE, confidence=1 - 0.110)
    assert not decided([answer([10, 20, 15, 15], [1, -1], 2, fresh=1), known], ONE, confidence=0.01)


def test_the_leader_may_be_any_answer():
    ones, answers = torch.ones(3, dtype=torch.float64), [answer([v, v + 1, v], [0.1, 0], 1) for v in (1, 50, 70)]
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        assert decided([answers[index] for index in order], ones, 0.8)


def test_both_senses_must_be_decided():
    """The second is ahead by far, but per byte the two are equal."""
    seen = [answer([20, 21.5, 21], [1, -1], 1), answer([10.1, 11, 10.5], [0, 0], 1)]
    assert decided(seen, ONE, 0.8)
    assert not decided(seen, torch.tensor([2.0, 1.0], dtype=torch.float64), 0.8)


def test_what_is_never_and_always_decided():
    assert decided([answer([1, 2], [9, -9], 0), answer([2, 1.5], [-9, 9], 0)], ONE, 0.99)  # nothing is unknown
    assert not decided([answer([1, 1], [0], 1), answer([100, 100], [0], 1)], ONE, 0.5)  # one sample shows no spread
    assert not decided([answer([1, 2, 3], [0, 1], 1)], ONE[:1], 0.5)  # nothing to choose from
    assert decided([answer([1, 2, 2], [1, 2], 1), answer([3, 4, 4], [1, 2], 1)], ONE, 0.99)  # the gap has no spread
    assert not decided([answer([1, 2, 2], [1, 2], 1)] * 2, ONE, 0.01)  # a tie has no leader


def test_an_answer_forecast_from_few_masks_has_few_degrees_of_freedom():
    """The other's eight samples do not make up for the two that the first is forecast from: by 1 degree t = 13.9 has a
    tail of 0.023, by 7 of 1e-6; a single one shows nothing."""
    long = answer([100] * 16, [1, -1] * 4, 8)
    result = {count: answer([57.5] * 16, [0] * 8, 8, fresh=count) for count in (1, 2, 8)}
    verdicts = {count: [decided([short, long], ONE, confidence) for confidence in (0.9, 0.99)]
                for count, short in result.items()}  # fmt: skip
    assert verdicts == {1: [False, False], 2: [True, False], 8: [True, True]}


@pytest.mark.parametrize("place", ["values", "residuals", "influence"])
def test_what_is_not_a_number_decides_nothing(place):
    ahead, behind = answer([1, 2, 2], [1, -1], 1), answer([90, 91, 91], [0, 0], 1)
    assert decided([ahead, behind], ONE, 0.5)
    broken = replace(ahead, **{place: torch.full_like(getattr(ahead, place), float("nan"))})
    assert not decided([broken, behind], ONE, 0.5)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_choices_change_no_oftener_than_stated(confidence):
    """Gaps near zero, where it is hardest; both senses."""
    generator, sizes = torch.Generator().manual_seed(1), torch.tensor([3.0, 4.0], dtype=torch.float64)
    changed = early = 0
    for gap in torch.linspace(0, 2, 300, dtype=torch.float64):
        masked = torch.rand(128, 12, generator=generator) < 0.5  # (N, L)
        same = masked.unique(dim=0, return_inverse=True)[1]  # (N,) equal masks, equal nats
        noise = torch.randn(2, 128, 12, generator=generator).double()[:, same]  # (2, N, L)
        nats = (noise + torch.tensor([[[6.0]], [[8.0]]])) * masked
        nats[1] += gap / 4 * masked
        weight = 1 / masked.sum(1).clamp(min=1).double()  # (N,)
        for count in look_schedule(16, 8):
            answers = [complete(masked, weight, each[: 8 * count], 8 * count) for each in nats]
            if decided(answers, sizes, confidence):
                break
        means = torch.stack([each.values.mean() for each in answers]), (nats.sum(2) * weight).mean(1)  # 2 x (2,)
        chosen = [[(part / by).argmin().item() for by in (ONE, sizes)] for part in means]
        changed, early = changed + (chosen[0] != chosen[1]), early + (count < 16)
    assert changed <= 300 * (1 - confidence)
    assert early > 100  # the promise is kept by stopping, not by never stopping
