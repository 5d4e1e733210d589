"""Scores, sizes and allocation of models whose blocks lack attention or MLPs."""

import pytest
import torch

from structprune.config import StructuredSettings
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.statistics.scan import Scan
from structprune.structured.allocate import (
    equal_heads,
    head_choices,
    joint_counts,
    most_heads,
    most_ratio,
    ranked_choices,
    ratio_of,
)
from structprune.structured.choose import candidates, channel_multiple, choose_counts
from structprune.structured.plan import make_plan
from structprune.structured.ranking import rank_units
from structprune.structured.scores.table import SCORES
from structprune.structured.sizes import BlockSize, block_size, forward_macs
from structprune.structured.surgery import apply_plan

KEYS = {(0, "attention"), (1, "attention"), (1, "channels"), (3, "channels")}
STEP, STEPS = {"attention": 400, "channels": 30}, {"attention": 4, "channels": 64}
WHOLE = BlockSize(1, 4 * 400 + 64 * 30, STEP, STEPS, {"attention": 1600, "channels": 1920})
SIZES = [
    BlockSize(0, 1600, {"attention": 400}, {"attention": 4}, {"attention": 1600}),
    WHOLE,
    BlockSize(2, 0, {}, {}, {}),
    BlockSize(3, 1920, {"channels": 30}, {"channels": 64}, {"channels": 1920}),
]


@pytest.mark.parametrize("score", ["magnitude", "wanda", "fluctuation", "taylor", "obs"])
@pytest.mark.parametrize("family, form", [("llada", "query_heads"), ("dream", "query_heads"), ("dream", "kv_groups")])
def test_paths_are_those_of_a_whole_model_that_computes_the_same(gap_pair, calibration, score, family, form):
    settings = StructuredSettings(score=score, gqa=form, rounds=4)
    arm = "masked" if SCORES[score].arms else None
    gapped, whole = (rank_units(Scan(Adapter(model), calibration), settings, arm) for model in gap_pair(family))
    assert set(gapped) == KEYS and len(whole) == 8
    for key, path in gapped.items():
        assert path.steps == whole[key].steps and torch.allclose(path.cost, whole[key].cost, rtol=1e-3)


def test_sizes_and_macs(gap_pair):
    gapped, whole = (Adapter(model) for model in gap_pair("dream"))
    sizes = [block_size(block, "query_heads") for block in gapped.blocks]
    full = block_size(whole.blocks[0], "query_heads")
    assert [set(size.step) for size in sizes] == [{"attention"}, {"attention", "channels"}, set(), {"channels"}]
    assert sizes[1].step == full.step and sizes[1].steps == full.steps and sizes[1].total == full.total
    assert sizes[0].total + sizes[3].total == full.total and sizes[2].total == 0
    absent = sum(
        block[role].weight.numel()
        for block, own in zip(whole.blocks, gapped.blocks)
        for role in block.names
        if role not in own.names
    )
    scores = 2 * 2 * 6 * 8 * 10  # of two blocks: q k and p v, heads x head dim x keys
    assert forward_macs(whole, 10) - forward_macs(gapped, 10) == 10 * (absent + scores)


def test_ratio_and_most(random_paths):
    counts = {(0, "attention"): 2, (1, "attention"): 1, (1, "channels"): 8, (3, "channels"): 20}
    assert ratio_of(SIZES, counts) == (800 + 400 + 240 + 600) / 7040
    assert most_heads(SIZES) == 6
    assert most_ratio(SIZES, 16) == (3 * 400 + 3 * 400 + 48 * 30 + 48 * 30) / 7040
    assert channel_multiple(SIZES, StructuredSettings(round_to=8)) == 8
    assert channel_multiple(SIZES[:1], StructuredSettings()) == 1


def test_uniform_by_hand():
    """At a half: blocks 1 and 3 lose their share; what two heads of the first are short of or beyond is spread."""
    choices = head_choices(SIZES, [0.5] * 4, 1)
    # the first block owes 800 less 400 a head, spread over 1760 and 960 parameters
    assert choices[2] == {(0, "attention"): 2, (1, "attention"): 2, (1, "channels"): 32, (3, "channels"): 32}
    assert choices[1] == {(0, "attention"): 1, (1, "attention"): 1, (1, "channels"): 54, (3, "channels"): 37}
    assert choices[3] == {(0, "attention"): 3, (1, "attention"): 3, (1, "channels"): 10, (3, "channels"): 27}
    assert all(ratio_of(SIZES, counts) == pytest.approx(0.5, abs=0.005) for counts in choices.values())
    assert equal_heads(SIZES, 0.5, choices) == 2


def test_blocks_without_any_mlp():
    """Where the others are protected: heads alone make up what they can."""
    sizes = [SIZES[0], BlockSize(4, 1600, {"attention": 400}, {"attention": 4}, {"attention": 1600})]
    assert head_choices(sizes, [0.5] * 2, 1) == {2: {(0, "attention"): 2, (4, "attention"): 2}}
    with pytest.raises(UserError, match="no plan meets ratio 0.9500: the most is 0.7500"):
        head_choices(sizes, [0.95] * 2, 1)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("rank", [False, True])
def test_global_allocation_meets_the_ratio(random_paths, ratio, rank):
    paths = random_paths(SIZES, rank=rank)
    assert ratio_of(SIZES, joint_counts(SIZES, paths, ratio, 1)) == pytest.approx(ratio, abs=0.005)
    choices = ranked_choices(SIZES, paths, ratio, 1)
    assert choices and all(set(counts) == set(paths) for counts in choices.values())
    for steps, counts in choices.items():
        assert sum(count for (_, kind), count in counts.items() if kind == "attention") == steps
        assert ratio_of(SIZES, counts) == pytest.approx(ratio, abs=0.005)
        assert all(
            count < size.steps[kind]
            for size in SIZES
            for kind, count in ((k, counts[size.index, k]) for k in size.step)
        )


@pytest.mark.parametrize("allocation, split", [
    ("uniform", "equal"), ("uniform", 1), ("global", "joint"), ("global", "by-cost"), ("depth", "equal"),
])  # fmt: skip
def test_a_choice_makes_a_plan_that_fits(gap_pair, random_paths, allocation, split):
    model = gap_pair("llada")[0]
    adapter = Adapter(model)
    sizes = [block_size(block, "query_heads") for block in adapter.blocks]
    settings = StructuredSettings(ratio=0.4, allocation=allocation, split=split, depth_slope=0.1)
    paths = random_paths(sizes)
    choice = choose_counts(sizes, paths, settings, measure=lambda counts: 0.0)
    plain = choice.plain(sizes)
    assert plain["ratio"] == pytest.approx(0.4, abs=0.02) and plain["blocks"] == [0, 1, 2, 3]
    assert plain["attention"][2:] == [0, 0] and plain["channels"][0] == plain["channels"][2] == 0
    small = apply_plan(model, make_plan(adapter, paths, choice.counts, "query_heads"))
    left = sum(block_size(block, "query_heads").total for block in Adapter(small).blocks)
    assert 1 - left / sum(size.total for size in sizes) == pytest.approx(plain["ratio"], abs=1e-6)
    assert candidates(sizes, settings, paths)
