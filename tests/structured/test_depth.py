"""Equal blocks with whole ones dropped: sizes by hand, and the descent over blocks and heads."""

from dataclasses import replace

import pytest

from structprune.config import StructuredSettings
from structprune.errors import UserError
from structprune.progress import untracked
from structprune.structured.allocate import ratio_of
from structprune.structured.choose import candidates
from structprune.structured.depth import (
    Trial,
    check_dropped,
    descend,
    dropped_counts,
    equal_choices,
    most_dropped,
    remaining_ratio,
    ruled_choices,
    search_dropped,
)

# `toy`: three blocks of 4 heads with 400 parameters each and 64 channels with 30 each, 3520 in all


def settings(**changes) -> StructuredSettings:
    return StructuredSettings(**{"allocation": "uniform", "ratio": 0.5} | changes)


def test_widths_after_one_block_by_hand(toy):
    """5280 parameters go: 3520 with block 1, and 880 from each of the others."""
    assert remaining_ratio(toy, [1], 0.5) == pytest.approx(0.25)
    choices = equal_choices(toy, [1], settings())
    removed = {heads: counts[0, "channels"] for heads, counts in choices.items()}
    assert removed == {0: 29, 1: 16, 2: 3}  # 880 / 30, 480 / 30, 80 / 30; three heads would be 1200
    for heads, counts in choices.items():
        assert counts == {(index, "attention"): heads for index in (0, 2)} | {
            (index, "channels"): removed[heads] for index in (0, 2)
        }
    whole = choices[1] | dropped_counts(toy, [1])
    assert whole[1, "attention"] == 4 and whole[1, "channels"] == 64
    assert ratio_of(toy, whole) == 0.5


def test_blocks_alone_may_make_up_the_ratio(toy):
    choices = equal_choices(toy, [0, 2], settings(ratio=2 / 3))
    assert choices == {0: {(1, "attention"): 0, (1, "channels"): 0}}
    assert most_dropped(toy, settings(ratio=2 / 3)) == 2
    assert equal_choices(toy, [0, 1], settings()) == {} and most_dropped(toy, settings()) == 1
    assert equal_choices(toy, [0, 1, 2], settings(ratio=0.99)) == {}  # a block stays


def test_without_a_dropped_block_the_choices_are_those_of_the_split(toy):
    assert equal_choices(toy, (), settings()) == candidates(toy, settings())


def test_the_split_rules(toy, random_paths):
    paths = random_paths(toy)
    gone = dropped_counts(toy, [1])
    measured = ruled_choices(toy, (1,), settings(), paths)
    assert list(measured) == [0, 1, 2] and all(counts.items() >= gone.items() for counts in measured.values())
    assert list(ruled_choices(toy, (1,), settings(split=2), paths)) == [2]
    assert ruled_choices(toy, (1,), settings(split=3), paths) == {}
    assert list(ruled_choices(toy, (1,), settings(split="equal"), paths)) == [1]  # a quarter of four heads
    by_cost = ruled_choices(toy, (1,), settings(split="by-cost"), paths)
    cost = {
        heads: sum(float(paths[key].cost[:steps].sum()) for key, steps in counts.items() if key[0] != 1)
        for heads, counts in measured.items()
    }
    assert list(by_cost) == [min(cost, key=cost.get)]


def test_a_ratio_without_room_for_a_block(toy):
    check_dropped(toy, settings(ratio=1 / 3))
    with pytest.raises(
        UserError, match=r"structured.ratio = 0.2 has no room for one of 3, a share of 0.3333: raise the ratio, or"
    ):
        check_dropped(toy, settings(ratio=0.2))
    with pytest.raises(UserError, match="has no room"):
        check_dropped(toy[:1], settings(ratio=0.7))  # the only block stays


def test_blocks_that_differ_are_refused(toy):
    other = replace(toy[1], total=1600, step={"attention": 400}, steps={"attention": 4}, whole={"attention": 1600})
    with pytest.raises(UserError, match="this model's differ in width: set export.compat = free and structured.alloc"):
        check_dropped([toy[0], other, toy[2]], settings())


def test_a_descent_goes_downhill_from_the_start():
    choices, calls = {heads: {(0, "attention"): heads} for heads in (0, 1, 2, 4, 5, 6)}, []

    def measure(counts):
        calls.append(counts[0, "attention"])
        return abs(calls[-1] - 4)

    assert descend(choices, 1, measure) == {1: 3, 0: 4, 2: 2, 4: 0, 5: 1}
    assert len(calls) == len(set(calls))
    many = {heads: {(0, "attention"): heads} for heads in range(64)}  # strides of four
    assert sorted(descend(many, 20, lambda counts: abs(counts[0, "attention"] - 29))) == [16, 20, 24, 28, 32]


@pytest.mark.parametrize(
    "losses, visited, best",
    [
        ([5, 4, 6, 7, 1], 3, 1),  # two in a row are worse than the best: the last is never tried
        ([5, 6, 4, 5, 3], 4, 4),  # one alone is walked over
        ([5, 6, 7, 1, 1], 2, 0),
    ],
)
def test_the_search_ends_after_two_that_are_worse(losses, visited, best):
    asked = []

    def next_block(dropped):
        asked.append(dropped)
        return 10 + len(dropped)

    trials = search_dropped(
        Trial((), 0, {}, losses[0]),
        4,
        lambda dropped: {0: {(len(dropped), "attention"): 0}},
        next_block,
        lambda counts: losses[next(iter(counts))[0]],
        untracked,
    )
    assert len(asked) == visited == len(trials) - 1
    assert len(min(trials, key=lambda trial: trial.loss).dropped) == best
    assert trials[-1].dropped == tuple(range(10, 10 + visited))


def test_the_title_shows_the_best_so_far():
    titles = []

    def track(items, title):
        for item in items:
            titles.append(title())
            yield item

    search_dropped(
        Trial((), 0, {}, 2.0), 2, lambda dropped: {0: {(len(dropped), "attention"): 0}}, len,
        lambda counts: {1: 1.5, 2: 3.0}[next(iter(counts))[0]], track,
    )  # fmt: skip
    assert titles == [
        "blocks dropped (best 2.0000 nats without 0)", "blocks dropped (best 1.5000 nats without 1)"
    ]  # fmt: skip
