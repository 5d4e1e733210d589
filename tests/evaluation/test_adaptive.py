"""When a choice is decided, by hand, and how often that is wrong."""

import pytest
import torch

from structprune.evaluation.adaptive import decided, look_schedule, student_tail


@pytest.mark.parametrize(
    "blocks, looks",
    [(1, [1]), (2, [2]), (3, [2, 3]), (16, [*range(2, 17)]), (22, [*range(2, 17), 18, 20, 22])],
)
def test_looks(blocks, looks):
    assert look_schedule(blocks) == looks


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


def values(*answers) -> torch.Tensor:
    return torch.tensor(answers, dtype=torch.float64)


def test_decided_by_hand():
    """Gaps 3 and 5: mean 4, spread √2, of 2 blocks in 4 an error of √2 √(1/2 - 1/4) = 0.7071, so t = 5.657 of 1 degree:
    a tail of 1/2 - arctan(5.657)/π = 0.0557. The error allowed is shared by 1 other answer and 2 senses: 0.1114."""
    seen = values([-10, -20], [-13, -25])
    assert decided(seen, ONE, blocks=4, confidence=1 - 0.113)
    assert not decided(seen, ONE, blocks=4, confidence=1 - 0.110)
    # a third answer far behind shares the error: 0.2228
    three, ones = values([-10, -20], [-13, -25], [-900, -910]), torch.ones(3, dtype=torch.float64)
    assert decided(three, ones, blocks=4, confidence=1 - 0.224)
    assert not decided(three, ones, blocks=4, confidence=1 - 0.221)
    # of 2 blocks in 1000 the correction is gone: an error of nearly 1, t = 4.004, a tail of 0.0779
    assert not decided(seen, ONE, blocks=1000, confidence=1 - 0.150)
    assert decided(seen, ONE, blocks=1000, confidence=1 - 0.160)


def test_the_leader_may_be_any_answer():
    ones = torch.ones(3, dtype=torch.float64)
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        assert decided(values([-1.0, -1.1], [-50, -51], [-70, -72])[order], ones, 16, 0.8)


def test_both_senses_must_be_decided():
    """The second is ahead by far, but per byte the two are equal."""
    seen = values([-20.0, -21.5], [-10.1, -11.0])
    assert decided(seen, ONE, 16, 0.8)
    assert not decided(seen, torch.tensor([2.0, 1.0], dtype=torch.float64), 16, 0.8)


def test_what_is_never_and_always_decided():
    assert decided(values([-1, -2], [-2, -1]), ONE, 2, 0.99)  # all blocks seen
    assert not decided(values([-1], [-100]), ONE, 4, 0.5)  # one block shows no spread
    assert not decided(values([-1, -2, -3]), ONE[:1], 4, 0.5)  # nothing to choose from
    assert decided(values([-1, -2], [-3, -4]), ONE, 16, 0.99)  # no spread at all in the gap
    assert not decided(values([-1, -2], [-1, -2]), ONE, 16, 0.01)  # a tie has no leader


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_choices_change_no_oftener_than_stated(confidence):
    """Gaps near zero, where it is hardest; both senses."""
    generator, sizes = torch.Generator().manual_seed(1), torch.tensor([3.0, 4.0], dtype=torch.float64)
    changed = early = 0
    for gap in torch.linspace(0, 2, 300, dtype=torch.float64):
        stream = torch.randn(2, 16, generator=generator, dtype=torch.float64) - torch.tensor([[30.0], [40.0]])
        stream[1] -= gap
        for count in look_schedule(16):
            if decided(stream[:, :count], sizes, 16, confidence):
                break
        chosen = [[(part.mean(1) / by).argmax().item() for by in (ONE, sizes)] for part in (stream[:, :count], stream)]
        changed, early = changed + (chosen[0] != chosen[1]), early + (count < 16)
    assert changed <= 300 * (1 - confidence)
    assert early > 100  # the promise is kept by stopping, not by never stopping
