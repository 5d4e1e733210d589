"""Grids, prices, knapsack and evolution on made-up blocks, by hand and against brute force."""

import itertools
import random

import pytest
import torch

from structprune.levels.evolve import Best, Space, distinct_offspring, evolve, repaired
from structprune.levels.grid import level_grids, neighbour
from structprune.levels.knapsack import knapsack, total_price
from structprune.levels.prices import fill_budget, mac_price, parameter_price, price_table
from structprune.models.adapter import Adapter
from structprune.structured.paths import RemovalPath
from structprune.structured.sizes import BlockSize, block_size

SIZE = BlockSize(
    0, 1500 + 1920, {"attention": 300, "channels": 30}, {"attention": 4, "channels": 64},
    {"attention": 1500, "channels": 1920},
)  # fmt: skip
HEADS, CHANNELS = (0, "attention"), (0, "channels")


def test_levels_lie_around_the_plan():
    grids = level_grids([SIZE], [{HEADS: 1, CHANNELS: 24}], 8, per_side=2, spread=0.5, whole=True)
    # strides: half of 4 heads over 2 levels, half of 64 channels over 2; the last head and 8 channels stay
    assert grids == {HEADS: (0, 1, 2, 3, 4), CHANNELS: (0, 8, 24, 40, 56, 64)}
    narrow = level_grids([SIZE], [{HEADS: 1, CHANNELS: 24}], 8, per_side=1, spread=0.125, whole=False)
    assert narrow == {HEADS: (0, 1, 2), CHANNELS: (16, 24, 32)}


def test_levels_around_a_whole_part_that_is_gone():
    grids = level_grids([SIZE], [{HEADS: 4, CHANNELS: 64}], 8, per_side=1, spread=0.25, whole=False)
    assert grids == {HEADS: (3, 4), CHANNELS: (48, 56, 64)}


def test_levels_of_several_plans():
    plans = [{HEADS: 0, CHANNELS: 16}, {HEADS: 2, CHANNELS: 48}]
    grids = level_grids([SIZE], plans, 8, per_side=1, spread=0.125, whole=False)
    assert grids == {HEADS: (0, 1, 2, 3), CHANNELS: (8, 16, 24, 40, 48, 56)}


@pytest.mark.parametrize("width, multiple", [(48, 8), (50, 8), (64, 32), (7, 1)])
def test_every_level_leaves_a_multiple(width, multiple):
    size = BlockSize(0, 3 * width, {"channels": 3}, {"channels": width}, {"channels": 3 * width})
    center = width - 3 * multiple if width > 3 * multiple else 0
    grids = level_grids([size], [{CHANNELS: center}], multiple, per_side=3, spread=0.6, whole=True)
    assert all(steps == 0 or (width - steps) % multiple == 0 for steps in grids[CHANNELS])
    assert {center, width} <= set(grids[CHANNELS]) and len(grids[CHANNELS]) >= 3


def test_the_next_level():
    grids = {CHANNELS: (0, 8, 24)}
    assert [neighbour(grids, {CHANNELS: 8}, CHANNELS, step) for step in (-1, 1)] == [0, 24]
    assert (
        neighbour(grids, {CHANNELS: 24}, CHANNELS, 1) is None and neighbour(grids, {CHANNELS: 0}, CHANNELS, -1) is None
    )


def test_prices_of_parameters():
    price = parameter_price([SIZE])
    assert [price(HEADS, steps) for steps in (0, 1, 4)] == [1500, 1200, 0]
    assert [price(CHANNELS, steps) for steps in (0, 8, 64)] == [1920, 1680, 0]
    assert price_table(price, {HEADS: (0, 4)}) == {HEADS: {0: 1500, 4: 0}}


def test_prices_of_macs_count_scores(tiny_model):
    adapter = Adapter(tiny_model("dream"))  # 6 query heads of 8 in 2 groups: a step takes one of each
    price = mac_price([block_size(adapter.blocks[0], "query_heads")], adapter, length=10)
    whole = adapter.blocks[0]
    linears = sum(
        value.numel() for role in ("query", "key", "value", "attention_output") for value in whole[role].parameters()
    )
    assert price(HEADS, 0) == linears + 2 * 6 * 8 * 10
    assert price(HEADS, 1) == linears - 2 * (2 * 8 * 32 + 8) + 2 * 4 * 8 * 10
    assert price(HEADS, 3) == 0 and price(CHANNELS, 48) == 0 and price(CHANNELS, 47) == 96


def tables(seed: int, keys: int, levels: int):
    draw = random.Random(seed)
    names = [(index, "channels") for index in range(keys)]
    losses = {key: {steps: draw.uniform(-0.1, 1) * steps for steps in range(levels)} for key in names}
    prices = {key: {steps: draw.uniform(5, 9) * (levels - steps) for steps in range(levels)} for key in names}
    return losses, prices


@pytest.mark.parametrize("seed", range(6))
def test_the_knapsack_is_as_good_as_trying_everything(seed):
    losses, prices = tables(seed, keys=5, levels=4)
    budget = 0.6 * sum(price[0] for price in prices.values())
    plan = knapsack(losses, prices, budget)
    plans = [dict(zip(losses, steps)) for steps in itertools.product(range(4), repeat=5)]
    best = min(
        sum(losses[key][steps] for key, steps in each.items()) for each in plans if total_price(prices, each) <= budget
    )
    assert plan is not None and total_price(prices, plan) <= budget and list(plan) == list(losses)
    assert sum(losses[key][steps] for key, steps in plan.items()) == pytest.approx(best, abs=1e-9)


def test_the_knapsack_of_a_budget_that_is_too_small():
    losses, prices = tables(0, keys=3, levels=2)
    least = sum(min(price.values()) for price in prices.values())
    assert knapsack(losses, prices, 0.99 * least) is None
    plan = knapsack(losses, prices, least)
    assert plan is not None and total_price(prices, plan) == pytest.approx(least)


def space(keys: int = 6) -> Space:
    names = [(index, "channels") for index in range(keys)]
    grids = dict.fromkeys(names, (0, 8, 16, 24, 32))
    prices = {key: {steps: float(32 - steps) for steps in grid} for key, grid in grids.items()}
    return Space(grids, prices, budget=16.0 * keys)


def test_offspring_meet_the_budget():
    ground = space()
    parent = dict.fromkeys(ground.grids, 16)
    plans = distinct_offspring(ground, parent, 20, random.Random(0))
    assert len(plans) == 20 and all(total_price(ground.prices, plan) == 96 for plan in plans)
    assert parent not in plans and len({tuple(plan.values()) for plan in plans}) == 20


def test_a_plan_that_cannot_be_repaired():
    ground = Space({CHANNELS: (0, 8)}, {CHANNELS: {0: 10.0, 8: 2.0}}, budget=5.0)
    assert repaired(ground, {CHANNELS: 0}, random.Random(0)) is None


def test_evolution_comes_near_the_best_plan_and_can_be_continued():
    ground = space()
    goal = dict(zip(ground.grids, (0, 0, 8, 24, 32, 32)))

    def measure(counts, share):
        return float(sum(abs(counts[key] - goal[key]) for key in goal))

    start = Best(-1, dict.fromkeys(goal, 16), measure(dict.fromkeys(goal, 16), 1))
    whole = list(evolve(ground, start, measure, range(40), 12, seed=3))
    assert [best.generation for best in whole] == list(range(40)) and whole[-1].loss <= 8 < start.loss
    assert all(later.loss <= earlier.loss for earlier, later in zip(whole, whole[1:]))
    rest = list(evolve(ground, whole[9], measure, range(10, 40), 12, seed=3))
    assert rest == whole[10:]


def test_only_survivors_are_measured_on_everything():
    shares = []
    start = Best(-1, dict.fromkeys(space().grids, 16), 1.0)
    list(evolve(space(), start, lambda counts, share: shares.append(share) or 2.0, range(1), 8, seed=0))
    assert shares == [0.25] * 8 + [1.0] * 2


def test_what_is_left_of_a_budget_goes_to_the_dearest_channels():
    keys = [(index, "channels") for index in range(2)]
    sizes = [BlockSize(index, 640, {"channels": 10}, {"channels": 64}, {"channels": 640}) for index in range(2)]
    costs = {key: [float(place * (1 + key[0])) for place in range(64)] for key in keys}
    steps = tuple((step,) for step in range(64))
    paths = {key: RemovalPath(steps, torch.tensor(cost).double()) for key, cost in costs.items()}
    counts = fill_budget(dict.fromkeys(keys, 32), paths, parameter_price(sizes), budget=640 + 250, multiple=8)
    assert counts == {(0, "channels"): 24, (1, "channels"): 16}  # 28 a channel here, twice 20 there
    gone = fill_budget({keys[0]: 64, keys[1]: 0}, paths, parameter_price(sizes), budget=1280, multiple=8)
    assert gone == {keys[0]: 64, keys[1]: 0}  # an MLP that is gone stays gone
