"""Allocation by hand: which heads and channels go at a ratio, per block, over all blocks and jointly."""

from dataclasses import replace

import pytest
import torch

from structprune.config import StructuredSettings
from structprune.errors import UserError
from structprune.models.adapter import UNIT_KINDS
from structprune.structured.allocate import (
    check_ratio,
    depth_ratios,
    equal_heads,
    head_choices,
    joint_counts,
    path_cost,
    ranked_choices,
    ratio_of,
)
from structprune.structured.choose import candidates, choose_counts
from structprune.structured.sizes import BlockSize


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_ratios_outside_the_range(ratio):
    with pytest.raises(UserError, match=r"lies outside \[0, 1\)"):
        check_ratio(ratio)


def test_the_most_of_a_width_that_is_no_multiple(toy, random_paths):
    sizes = [replace(toy[0], steps={"attention": 4, "channels": 64})]
    counts = ranked_choices(sizes, random_paths(sizes), 0.5, 48)  # widths 64 or 48
    assert {64 - c[0, "channels"] for c in counts.values()} <= {64, 48}
    for ratio in (0.0, 0.02, 0.1):  # nearest to 64 is 64 itself, or the multiple below
        choices = head_choices(sizes, [ratio], 48)
        assert all(64 - c[0, "channels"] in (64, 48) for c in choices.values())


def test_blocks_with_one_head_lose_channels_only(toy, random_paths):
    sizes = [replace(size, steps={"attention": 1, "channels": 64}) for size in toy]
    assert list(ranked_choices(sizes, random_paths(sizes), 0.25, 1)) == [0]


def test_by_hand_uniform(toy):
    choices = head_choices(toy, [0.5] * 3, 1)  # 1760 parameters a block: h heads and (1760 - 400 h) / 30 channels
    assert {h: c[0, "channels"] for h, c in choices.items()} == {0: 59, 1: 45, 2: 32, 3: 19}
    assert head_choices(toy, [0.5] * 3, 16)[2][1, "channels"] == 32


def test_depth_falls_linearly(toy):
    assert depth_ratios(3, 0.5, 0.2) == pytest.approx([0.6, 0.5, 0.4])
    assert depth_ratios(1, 0.5, 0.2) == [0.5] and depth_ratios(2, 0.3, -0.2) == pytest.approx([0.2, 0.4])
    counts = candidates(toy, StructuredSettings(ratio=0.5, allocation="depth", depth_slope=0.4))[2]
    # 2.8, 2 and 1.2 heads, what rounding leaves carried on; 2464, 1760 and 1056 parameters a block
    assert [counts[index, "attention"] for index in range(3)] == [3, 2, 1]
    assert [counts[index, "channels"] for index in range(3)] == [42, 32, 22]
    with pytest.raises(UserError, match="depth_slope = 0.9 takes a block's ratio outside"):
        candidates(toy, StructuredSettings(ratio=0.3, allocation="depth", depth_slope=0.9))


def test_joint_takes_the_cheapest_per_parameter(toy, random_paths):
    paths = {key: replace(path, cost=torch.full_like(path.cost, 1e9)) for key, path in random_paths(toy).items()}
    paths[1, "channels"] = replace(paths[1, "channels"], cost=torch.full((64,), 30.0, dtype=torch.float64))  # 1 each
    paths[2, "attention"] = replace(
        paths[2, "attention"], cost=torch.tensor([40.0, 800.0, 800.0, 1e9]).double()
    )  # .1, 2
    counts = joint_counts(toy, paths, (400 + 30 * 20) / (3 * 3520), 1)  # the head first, then 20 channels
    assert {key: count for key, count in counts.items() if count} == {(2, "attention"): 1, (1, "channels"): 20}
    counts = joint_counts(toy, paths, (400 + 30 * 63 + 400) / (3 * 3520), 1)  # 63 channels are all that may go
    assert counts[1, "channels"] == 63 and counts[2, "attention"] == 2


def test_joint_fills_up_with_channels_where_a_head_would_overshoot(toy, random_paths):
    paths = random_paths(toy)
    cheap = [torch.zeros(4).double(), torch.arange(64).double() + 1]  # heads first, whatever they weigh
    paths = {key: replace(path, cost=cheap[UNIT_KINDS.index(key[1])]) for key, path in paths.items()}
    counts = joint_counts(toy, paths, 700 / (3 * 3520), 1)  # one head, and 300 parameters are left
    assert sum(counts[index, "attention"] for index in range(3)) == 1
    assert sum(counts[index, "channels"] for index in range(3)) == 10


def test_joint_takes_a_head_too_many_where_no_channels_are_left(toy, random_paths):
    expensive = [torch.full((4,), 1e9).double(), torch.arange(64).double()]
    paths = {key: replace(path, cost=expensive[UNIT_KINDS.index(key[1])]) for key, path in random_paths(toy).items()}
    counts = joint_counts(toy, paths, (3 * 63 * 30 + 300) / (3 * 3520), 1)
    assert sum(counts[index, "attention"] for index in range(3)) == 1
    assert all(counts[index, "channels"] == 63 for index in range(3))


def test_joint_ranks_by_the_scores_own_rank_as_it_is(toy, random_paths):
    paths = random_paths(toy, rank=True)
    ranks = {key: torch.full_like(path.rank, 5.0) for key, path in paths.items()}
    ranks[0, "attention"][:2] = -1.0  # heads are thirteen times as large: their rank is not divided by it
    paths = {key: replace(path, rank=ranks[key]) for key, path in paths.items()}
    counts = joint_counts(toy, paths, 800 / (3 * 3520), 1)
    assert {key: count for key, count in counts.items() if count} == {(0, "attention"): 2}


def test_global_ranks_heads_over_all_blocks_and_fills_with_channels(toy, random_paths):
    paths = random_paths(toy)
    cost = {0: [1.0, 9, 9, 9], 1: [2.0, 3, 9, 9], 2: [8.0, 9, 9, 9]}
    for index, values in cost.items():
        paths[index, "attention"] = replace(paths[index, "attention"], cost=torch.tensor(values).double())
    choices = ranked_choices(toy, paths, 0.3, 1)
    assert [choices[3][index, "attention"] for index in range(3)] == [1, 2, 0]
    assert sorted(choices) == list(range(0, 8))  # 0.3 * 10560 = 3168 = 7.9 heads
    for heads, counts in choices.items():
        assert sum(counts[index, "attention"] for index in range(3)) == heads
        assert ratio_of(toy, counts) == pytest.approx(0.3, abs=30 / 10560)


def test_split_by_cost_takes_the_least_predicted_loss(toy, random_paths):
    paths = random_paths(toy)
    for index in range(3):
        paths[index, "attention"] = replace(
            paths[index, "attention"], cost=torch.tensor([1.0, 50.0, 1e6, 1e6]).double()
        )
        paths[index, "channels"] = replace(paths[index, "channels"], cost=torch.full((64,), 2.0, dtype=torch.float64))
    choices = head_choices(toy, [0.5] * 3, 1)
    # 0 heads: 59 * 2, 1 head: 1 + 45 * 2, 2 heads: 51 + 32 * 2, in each of three blocks
    assert [path_cost(choices[heads], paths) for heads in (0, 1, 2)] == [354, 273, 345]
    assert min(choices, key=lambda heads: path_cost(choices[heads], paths)) == 1
    choice = choose_counts(toy, paths, StructuredSettings(ratio=0.5, allocation="uniform", split="by-cost"), None)
    assert choice.counts == choices[1] and choice.measured == {}


def test_equal_heads_takes_fewer_where_two_are_as_near():
    """Of three steps a block, one and two lie equally near to half, whatever floating point makes of it."""
    step, steps = {"attention": 300, "channels": 30}, {"attention": 3, "channels": 64}
    sizes = [BlockSize(index, 2820, step, steps, {"attention": 900, "channels": 1920}) for index in range(5)]
    choices = {heads: {(index, "attention"): heads for index in range(5)} for heads in (0, 1, 2)}
    assert equal_heads(sizes, 0.5, choices) == 1
