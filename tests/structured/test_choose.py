"""Counts: the ratio is met within one unit or rounding step, whatever the family, allocation and split."""

import random
from dataclasses import replace

import pytest

from structprune.config import StructuredSettings
from structprune.errors import UserError
from structprune.models.adapter import UNIT_KINDS, Adapter
from structprune.structured.allocate import most_ratio, ranked_choices, ratio_of
from structprune.structured.choose import candidates, check_choice, choose_counts, open_blocks
from structprune.structured.sizes import BlockSize, rounding

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
def test_ratios_are_met(tiny_model, name, allocation, split, random_paths):
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
            assert len({tuple(counts[size.index, kind] for kind in UNIT_KINDS) for size in sizes}) == 1
        if ratio == 0:
            assert not any(counts.values())


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_random_sizes_meet_random_ratios(allocation, random_paths):
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
        total = sum(steps[kind] * step[kind] for kind in UNIT_KINDS)
        whole = {kind: steps[kind] * step[kind] for kind in UNIT_KINDS}
        sizes = [BlockSize(index, total, step, steps, whole) for index in range(draw.randint(1, 5))]
        multiple, ratio = draw.choice([1, 8, 32]), draw.random() * 0.9
        if ratio > most_ratio(sizes, multiple):
            continue
        settings = StructuredSettings(ratio=ratio, allocation=allocation, split="by-cost", round_to=multiple)
        counts = choose_counts(sizes, random_paths(sizes, trial), settings, lambda counts: 0.0).counts
        slack = multiple * step["channels"] * (len(sizes) if allocation == "uniform" else 1)
        assert abs(ratio_of(sizes, counts) - ratio) * total * len(sizes) <= slack, (trial, multiple, ratio)


@pytest.mark.parametrize("allocation, split", [("uniform", "equal"), ("global", "equal"), ("global", "joint")])
def test_a_ratio_no_plan_meets_names_the_most(allocation, split, toy, random_paths):
    settings = StructuredSettings(ratio=0.9, allocation=allocation, split=split, round_to=16)
    most = (3 * 400 + 48 * 30) / 3520  # one head and 16 channels stay: 0.75
    assert most_ratio(toy, 16) == pytest.approx(most)
    with pytest.raises(UserError, match=f"no plan meets ratio 0.9.*the most is {most:.4f}"):
        choose_counts(toy, random_paths(toy), settings, lambda counts: 0.0)
    met = choose_counts(toy, random_paths(toy), settings.model_copy(update={"ratio": most}), lambda counts: 0.0)
    assert ratio_of(toy, met.counts) == pytest.approx(most)


def test_a_slope_no_plan_meets_names_the_nearest_ratio(toy):
    settings = StructuredSettings(ratio=0.82, allocation="depth", depth_slope=0.2)
    with pytest.raises(UserError, match="no plan meets ratio 0.8200: the nearest is") as caught:
        candidates(toy, settings)
    nearest = float(str(caught.value).split()[-1])
    assert nearest == pytest.approx(3090 / 3520 - 0.1, abs=0.0026)  # the first block at one head and one channel
    assert candidates(toy, settings.model_copy(update={"ratio": nearest}))


@pytest.mark.slow
def test_a_number_of_heads_over_all_blocks_is_met_though_not_every_number_is_tried(toy, random_paths):
    sizes = [replace(size, index=index) for index in range(30) for size in toy[:1]]  # 90 steps, every second one tried
    paths = random_paths(sizes)
    assert 7 not in ranked_choices(sizes, paths, 0.5, 1)
    choice = choose_counts(sizes, paths, StructuredSettings(ratio=0.5, split=7, round_to=1), lambda counts: 0.0)
    assert sum(choice.counts[index, "attention"] for index in range(30)) == 7
    assert ratio_of(sizes, choice.counts) == pytest.approx(0.5, abs=30 / (30 * 3520))


@pytest.mark.parametrize(
    "settings, message",
    [
        (StructuredSettings(split=10),
         "structured.split = 10 does not fit: over all blocks 0 to 9 attention steps can go"),
        (StructuredSettings(split=-1), "structured.split = -1 does not fit: over all blocks 0 to 9"),
        (StructuredSettings(split=4, allocation="uniform"),
         "structured.split = 4 does not fit: at this ratio .* 0, 1, 2, 3"),
        (StructuredSettings(ratio=0.99), "no plan meets ratio 0.9900: the most is"),
        (StructuredSettings(ratio=1), "outside"),
        (StructuredSettings(split="joint", allocation="depth"), "split = joint needs structured.allocation = global"),
    ],
)  # fmt: skip
def test_what_no_plan_can_have_is_refused_before_any_score(settings, message, toy):
    with pytest.raises(UserError, match=message):
        check_choice(toy, settings)
    check_choice(toy, StructuredSettings(split=9, ratio=0.5))


def test_equal_split(toy, random_paths):
    settings = StructuredSettings(ratio=0.5, allocation="uniform", split="equal")
    counts = choose_counts(toy, random_paths(toy), settings, lambda counts: 0.0).counts
    assert [counts[0, kind] for kind in UNIT_KINDS] == [2, 32]


def test_a_number_of_heads(toy, random_paths):
    settings = StructuredSettings(ratio=0.5, allocation="uniform", split=3)
    counts = choose_counts(toy, random_paths(toy), settings, None).counts
    assert [counts[index, "attention"] for index in range(3)] == [3, 3, 3]
    settings = StructuredSettings(ratio=0.5, allocation="global", split=5)
    counts = choose_counts(toy, random_paths(toy), settings, None).counts
    assert sum(counts[index, "attention"] for index in range(3)) == 5
    with pytest.raises(
        UserError, match="structured.split = 4 does not fit: at this ratio attention steps can be 0, 1, 2, 3"
    ):
        choose_counts(toy, random_paths(toy), StructuredSettings(ratio=0.5, allocation="uniform", split=4), None)


def test_joint_needs_global(toy, random_paths):
    with pytest.raises(UserError, match="split = joint needs structured.allocation = global, not uniform"):
        choose_counts(toy, random_paths(toy), StructuredSettings(allocation="uniform", split="joint"), None)


def test_measured_split_takes_the_best_candidate_it_measures(toy, random_paths):
    settings = StructuredSettings(ratio=0.5, allocation="uniform", split="measured")
    measured = []

    def measure(counts):
        measured.append(counts[0, "attention"])
        return {0: 3.0, 1: 2.5, 2: 2.0, 3: 7.0}[counts[0, "attention"]]

    choice = choose_counts(toy, random_paths(toy), settings, measure)
    assert choice.counts[0, "attention"] == 2 and choice.measured == {0: 3.0, 1: 2.5, 2: 2.0, 3: 7.0}
    assert sorted(measured) == [0, 1, 2, 3]  # each measured once
    free = choose_counts(toy, random_paths(toy), settings.model_copy(update={"ratio": 0.0}), None)
    assert not any(free.counts.values())  # nothing to measure


def test_protected_blocks_are_left_out(tiny_model, random_paths):
    adapter = Adapter(tiny_model())
    sizes = open_blocks(adapter, StructuredSettings(protect_first=1, protect_last=1))
    assert [size.index for size in sizes] == [1]
    counts = choose_counts(sizes, random_paths(sizes), StructuredSettings(ratio=0.5, split="equal"), None).counts
    assert {index for index, _ in counts} == {1} and ratio_of(sizes, counts) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(UserError, match="protect_first 2 . protect_last 1 leave none of 3 blocks"):
        open_blocks(adapter, StructuredSettings(protect_first=2, protect_last=1))
