"""Allocation: the ratio is met within one unit or rounding step, whatever the family, allocation and split."""

import random
from dataclasses import replace

import pytest
import torch

from structprune.config import StructuredSettings
from structprune.criteria.paths import KINDS, RemovalPath
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.structured.allocate import (
    cheapest_heads,
    check_ratio,
    depth_ratios,
    head_choices,
    joint_counts,
    most_ratio,
    path_cost,
    ranked_choices,
    ratio_of,
)
from structprune.structured.choose import candidates, check_choice, choose_counts, open_blocks
from structprune.structured.sizes import BlockSize, rounding

# head 4 D C = 4 * 100, channel 3 C = 30: totals as of blocks with 4 heads and 64 channels
TOY = [
    BlockSize(index, 4 * 400 + 64 * 30, {"attention": 400, "channels": 30}, {"attention": 4, "channels": 64})
    for index in range(3)
]


def random_paths(sizes: list[BlockSize], seed: int = 0, rank: bool = False) -> dict:
    """Paths of rising random cost: steps are numbered, one unit each."""
    generator, paths = torch.Generator().manual_seed(seed), {}
    for size in sizes:
        for kind in KINDS:
            steps = size.steps[kind]
            cost = torch.rand(steps, generator=generator, dtype=torch.float64).cumsum(0) * size.step[kind]
            order = torch.randn(steps, generator=generator, dtype=torch.float64).sort().values if rank else None
            paths[size.index, kind] = RemovalPath(tuple((step,) for step in range(steps)), cost, order)
    return paths


MODELS = {
    "mha": ("llada", {}),
    "mha with biases": ("llada", {"include_bias": True}),
    "gqa": ("dream", {}),
    "gqa by kv groups": ("dream", {"gqa": "kv_groups"}),
    "wide": ("llada", {"mlp_hidden_size": 256}),
}


@pytest.mark.parametrize("split", ["equal", "by-cost", "joint"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "depth"])
@pytest.mark.parametrize("name", MODELS)
def test_ratios_are_met(tiny_model, name, allocation, split):
    if split == "joint" and allocation != "global":
        return
    family, changes = MODELS[name]
    form = changes.get("gqa", "query_heads")
    adapter = Adapter(tiny_model(family, **{key: value for key, value in changes.items() if key != "gqa"}))
    base = StructuredSettings(allocation=allocation, split=split, gqa=form, depth_slope=0.2)
    sizes = open_blocks(adapter, base)
    for ratio in (0.0, 0.05, 0.1, 0.23, 0.3, 0.5, 0.61, 0.75, 0.8, 0.9):
        if allocation == "depth" and ratio < 0.1:
            continue  # the slope would take a block below zero
        settings = base.model_copy(update={"ratio": ratio})
        multiple = rounding(sizes[0].steps["channels"], "auto")
        if ratio + (0.1 if allocation == "depth" else 0) > most_ratio(sizes, multiple):
            continue  # more than a block has
        counts = choose_counts(sizes, random_paths(sizes), settings, lambda counts: 0.0).counts
        # to the nearest multiple: of every block under uniform, else of one
        bound = multiple * sizes[0].step["channels"] / 2 * (len(sizes) if allocation == "uniform" else 1)
        total = sum(size.total for size in sizes)
        assert abs(ratio_of(sizes, counts) - ratio) * total <= bound + 1e-6, ratio
        for size in sizes:
            assert 0 <= counts[size.index, "attention"] < size.steps["attention"]
            assert 0 <= counts[size.index, "channels"] < size.steps["channels"]
            assert (size.steps["channels"] - counts[size.index, "channels"]) % multiple == 0
        if allocation == "uniform":
            assert len({tuple(counts[size.index, kind] for kind in KINDS) for size in sizes}) == 1
        if ratio == 0:
            assert not any(counts.values())


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_random_sizes_meet_random_ratios(allocation):
    draw = random.Random(0)
    for trial in range(60):
        heads, dim, hidden, channels = (
            draw.choice([2, 4, 8]),
            draw.choice([4, 16]),
            draw.choice([32, 64]),
            draw.choice([64, 160]),
        )
        step = {"attention": 4 * dim * hidden, "channels": 3 * hidden}
        steps = {"attention": heads, "channels": channels}
        total = sum(steps[kind] * step[kind] for kind in KINDS)
        sizes = [BlockSize(index, total, step, steps) for index in range(draw.randint(1, 5))]
        multiple, ratio = draw.choice([1, 8, 32]), draw.random() * 0.9
        if ratio > most_ratio(sizes, multiple):
            continue
        settings = StructuredSettings(ratio=ratio, allocation=allocation, split="by-cost", round_to=multiple)
        counts = choose_counts(sizes, random_paths(sizes, trial), settings, lambda counts: 0.0).counts
        slack = multiple * step["channels"] * (len(sizes) if allocation == "uniform" else 1)
        assert abs(ratio_of(sizes, counts) - ratio) * total * len(sizes) <= slack, (trial, multiple, ratio)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_ratios_outside_the_range(ratio):
    with pytest.raises(UserError, match=r"lies outside \[0, 1\)"):
        check_ratio(ratio)


@pytest.mark.parametrize("allocation, split", [("uniform", "equal"), ("global", "equal"), ("global", "joint")])
def test_a_ratio_no_plan_meets_names_the_most(allocation, split):
    settings = StructuredSettings(ratio=0.9, allocation=allocation, split=split, round_to=16)
    most = (3 * 400 + 48 * 30) / 3520  # one head and 16 channels stay: 0.75
    assert most_ratio(TOY, 16) == pytest.approx(most)
    with pytest.raises(UserError, match=f"no plan meets ratio 0.9.*the most is {most:.4f}"):
        choose_counts(TOY, random_paths(TOY), settings, lambda counts: 0.0)
    met = choose_counts(TOY, random_paths(TOY), settings.model_copy(update={"ratio": most}), lambda counts: 0.0)
    assert ratio_of(TOY, met.counts) == pytest.approx(most)


def test_a_slope_no_plan_meets_names_the_nearest_ratio():
    settings = StructuredSettings(ratio=0.82, allocation="depth", depth_slope=0.2)
    with pytest.raises(UserError, match="no plan meets ratio 0.8200: the nearest is") as caught:
        candidates(TOY, settings)
    nearest = float(str(caught.value).split()[-1])
    assert nearest == pytest.approx(3090 / 3520 - 0.1, abs=0.0026)  # the first block at one head and one channel
    assert candidates(TOY, settings.model_copy(update={"ratio": nearest}))


def test_the_most_of_a_width_that_is_no_multiple():
    sizes = [replace(TOY[0], steps={"attention": 4, "channels": 64})]
    counts = ranked_choices(sizes, random_paths(sizes), 0.5, 48)  # widths 64 or 48
    assert {64 - c[0, "channels"] for c in counts.values()} <= {64, 48}
    for ratio in (0.0, 0.02, 0.1):  # nearest to 64 is 64 itself, or the multiple below
        found = head_choices(sizes, [ratio], 48)
        assert all(64 - c[0, "channels"] in (64, 48) for c in found.values())


def test_a_number_of_heads_over_all_blocks_is_met_though_not_every_number_is_tried():
    sizes = [replace(size, index=index) for index in range(30) for size in TOY[:1]]  # 90 steps, every second one tried
    paths = random_paths(sizes)
    assert 7 not in ranked_choices(sizes, paths, 0.5, 1)
    found = choose_counts(sizes, paths, StructuredSettings(ratio=0.5, split=7, round_to=1), lambda counts: 0.0)
    assert sum(found.counts[index, "attention"] for index in range(30)) == 7
    assert ratio_of(sizes, found.counts) == pytest.approx(0.5, abs=30 / (30 * 3520))


@pytest.mark.parametrize(
    "settings, message",
    [
        (StructuredSettings(split=10), "structured.split = 10 does not fit: over all blocks 0 to 9 attention steps can go"),
        (StructuredSettings(split=-1), "structured.split = -1 does not fit: over all blocks 0 to 9"),
        (StructuredSettings(split=4, allocation="uniform"), "structured.split = 4 does not fit: at this ratio .* 0, 1, 2, 3"),
        (StructuredSettings(ratio=0.99), "no plan meets ratio 0.9900: the most is"),
        (StructuredSettings(ratio=1), "outside"),
        (StructuredSettings(split="joint", allocation="depth"), "split = joint needs structured.allocation = global"),
    ],
)  # fmt: skip
def test_what_no_plan_can_have_is_refused_before_any_score(settings, message):
    with pytest.raises(UserError, match=message):
        check_choice(TOY, settings)
    check_choice(TOY, StructuredSettings(split=9, ratio=0.5))


def test_blocks_with_one_head_lose_channels_only():
    sizes = [replace(size, steps={"attention": 1, "channels": 64}) for size in TOY]
    assert list(ranked_choices(sizes, random_paths(sizes), 0.25, 1)) == [0]


def test_by_hand_uniform():
    choices = head_choices(TOY, [0.5] * 3, 1)  # 1760 parameters a block: h heads and (1760 - 400 h) / 30 channels
    assert {h: c[0, "channels"] for h, c in choices.items()} == {0: 59, 1: 45, 2: 32, 3: 19}
    assert head_choices(TOY, [0.5] * 3, 16)[2][1, "channels"] == 32


def test_depth_falls_linearly():
    assert depth_ratios(3, 0.5, 0.2) == pytest.approx([0.6, 0.5, 0.4])
    assert depth_ratios(1, 0.5, 0.2) == [0.5] and depth_ratios(2, 0.3, -0.2) == pytest.approx([0.2, 0.4])
    counts = candidates(TOY, StructuredSettings(ratio=0.5, allocation="depth", depth_slope=0.4))[2]
    # 2.8, 2 and 1.2 heads, what rounding leaves carried on; 2464, 1760 and 1056 parameters a block
    assert [counts[index, "attention"] for index in range(3)] == [3, 2, 1]
    assert [counts[index, "channels"] for index in range(3)] == [42, 32, 22]
    with pytest.raises(UserError, match="depth_slope = 0.9 takes a block's ratio outside"):
        candidates(TOY, StructuredSettings(ratio=0.3, allocation="depth", depth_slope=0.9))


def test_joint_takes_the_cheapest_per_parameter():
    paths = {key: replace(path, cost=torch.full_like(path.cost, 1e9)) for key, path in random_paths(TOY).items()}
    paths[1, "channels"] = replace(paths[1, "channels"], cost=torch.full((64,), 30.0, dtype=torch.float64))  # 1 each
    paths[2, "attention"] = replace(
        paths[2, "attention"], cost=torch.tensor([40.0, 800.0, 800.0, 1e9]).double()
    )  # .1, 2
    counts = joint_counts(TOY, paths, (400 + 30 * 20) / (3 * 3520), 1)  # the head first, then 20 channels
    assert {key: count for key, count in counts.items() if count} == {(2, "attention"): 1, (1, "channels"): 20}
    counts = joint_counts(TOY, paths, (400 + 30 * 63 + 400) / (3 * 3520), 1)  # 63 channels are all that may go
    assert counts[1, "channels"] == 63 and counts[2, "attention"] == 2


def test_joint_fills_up_with_channels_where_a_head_would_overshoot():
    paths = random_paths(TOY)
    cheap = [torch.zeros(4).double(), torch.arange(64).double() + 1]  # heads first, whatever they weigh
    paths = {key: replace(path, cost=cheap[KINDS.index(key[1])]) for key, path in paths.items()}
    counts = joint_counts(TOY, paths, 700 / (3 * 3520), 1)  # one head, and 300 parameters are left
    assert sum(counts[index, "attention"] for index in range(3)) == 1
    assert sum(counts[index, "channels"] for index in range(3)) == 10


def test_joint_takes_a_head_too_many_where_no_channels_are_left():
    expensive = [torch.full((4,), 1e9).double(), torch.arange(64).double()]
    paths = {key: replace(path, cost=expensive[KINDS.index(key[1])]) for key, path in random_paths(TOY).items()}
    counts = joint_counts(TOY, paths, (3 * 63 * 30 + 300) / (3 * 3520), 1)
    assert sum(counts[index, "attention"] for index in range(3)) == 1
    assert all(counts[index, "channels"] == 63 for index in range(3))


def test_joint_ranks_by_the_scores_own_rank_as_it_is():
    paths = random_paths(TOY, rank=True)
    ranks = {key: torch.full_like(path.rank, 5.0) for key, path in paths.items()}
    ranks[0, "attention"][:2] = -1.0  # heads are thirteen times as large: their rank is not divided by it
    paths = {key: replace(path, rank=ranks[key]) for key, path in paths.items()}
    counts = joint_counts(TOY, paths, 800 / (3 * 3520), 1)
    assert {key: count for key, count in counts.items() if count} == {(0, "attention"): 2}


def test_global_ranks_heads_over_all_blocks_and_fills_with_channels():
    paths = random_paths(TOY)
    cost = {0: [1.0, 9, 9, 9], 1: [2.0, 3, 9, 9], 2: [8.0, 9, 9, 9]}
    for index, values in cost.items():
        paths[index, "attention"] = replace(paths[index, "attention"], cost=torch.tensor(values).double())
    choices = ranked_choices(TOY, paths, 0.3, 1)
    assert [choices[3][index, "attention"] for index in range(3)] == [1, 2, 0]
    assert sorted(choices) == list(range(0, 8))  # 0.3 * 10560 = 3168 = 7.9 heads
    for heads, counts in choices.items():
        assert sum(counts[index, "attention"] for index in range(3)) == heads
        assert ratio_of(TOY, counts) == pytest.approx(0.3, abs=30 / 10560)


def test_equal_split():
    settings = StructuredSettings(ratio=0.5, allocation="uniform", split="equal")
    counts = choose_counts(TOY, random_paths(TOY), settings, lambda counts: 0.0).counts
    assert [counts[0, kind] for kind in KINDS] == [2, 32]


def test_split_by_cost_takes_the_least_predicted_loss():
    paths = random_paths(TOY)
    for index in range(3):
        paths[index, "attention"] = replace(
            paths[index, "attention"], cost=torch.tensor([1.0, 50.0, 1e6, 1e6]).double()
        )
        paths[index, "channels"] = replace(paths[index, "channels"], cost=torch.full((64,), 2.0, dtype=torch.float64))
    choices = head_choices(TOY, [0.5] * 3, 1)
    # 0 heads: 59 * 2, 1 head: 1 + 45 * 2, 2 heads: 51 + 32 * 2, in each of three blocks
    assert [path_cost(choices[heads], paths) for heads in (0, 1, 2)] == [354, 273, 345]
    assert cheapest_heads(choices, paths) == 1
    choice = choose_counts(TOY, paths, StructuredSettings(ratio=0.5, allocation="uniform", split="by-cost"), None)
    assert choice.counts == choices[1] and choice.measured == {}


def test_a_number_of_heads():
    settings = StructuredSettings(ratio=0.5, allocation="uniform", split=3)
    counts = choose_counts(TOY, random_paths(TOY), settings, None).counts
    assert [counts[index, "attention"] for index in range(3)] == [3, 3, 3]
    settings = StructuredSettings(ratio=0.5, allocation="global", split=5)
    counts = choose_counts(TOY, random_paths(TOY), settings, None).counts
    assert sum(counts[index, "attention"] for index in range(3)) == 5
    with pytest.raises(
        UserError, match="structured.split = 4 does not fit: at this ratio attention steps can be 0, 1, 2, 3"
    ):
        choose_counts(TOY, random_paths(TOY), StructuredSettings(ratio=0.5, allocation="uniform", split=4), None)


def test_joint_needs_global():
    with pytest.raises(UserError, match="split = joint needs structured.allocation = global, not uniform"):
        choose_counts(TOY, random_paths(TOY), StructuredSettings(allocation="uniform", split="joint"), None)


def test_measured_split_takes_the_best_candidate_it_measures():
    settings = StructuredSettings(ratio=0.5, allocation="uniform", split="measured")
    seen = []

    def measure(counts):
        seen.append(counts[0, "attention"])
        return {0: 3.0, 1: 2.5, 2: 2.0, 3: 7.0}[counts[0, "attention"]]

    choice = choose_counts(TOY, random_paths(TOY), settings, measure)
    assert choice.counts[0, "attention"] == 2 and choice.measured == {0: 3.0, 1: 2.5, 2: 2.0, 3: 7.0}
    assert sorted(seen) == [0, 1, 2, 3]  # each measured once
    free = choose_counts(TOY, random_paths(TOY), settings.model_copy(update={"ratio": 0.0}), None)
    assert not any(free.counts.values())  # nothing to measure


def test_protected_blocks_are_left_out(tiny_model):
    adapter = Adapter(tiny_model())
    sizes = open_blocks(adapter, StructuredSettings(protect_first=1, protect_last=1))
    assert [size.index for size in sizes] == [1]
    counts = choose_counts(sizes, random_paths(sizes), StructuredSettings(ratio=0.5, split="equal"), None).counts
    assert {index for index, _ in counts} == {1} and ratio_of(sizes, counts) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(UserError, match="protect_first 2 . protect_last 1 leave none of 3 blocks"):
        open_blocks(adapter, StructuredSettings(protect_first=2, protect_last=1))
