"""Evolutionary search over levels: width moves between blocks and kinds while the budget is met.

After the search of Týr-the-Pruner (arXiv 2503.09657) and EvoPress (arXiv 2410.14649): offspring are compared on a few
tokens first, and only the best of them on all.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from structprune.levels.grid import Grids, neighbour
from structprune.levels.knapsack import Table, total_price
from structprune.structured.allocate import Counts

Measure = Callable[[Counts, float], float]  # a plan, and the share of the windows to measure it on -> its loss

SLACK = 0.003  # of the budget that a plan may leave unused
REPAIRS = 60  # level changes at most that bring a plan back to the budget
FEW = 0.25  # of the windows, on which all offspring are measured
SURVIVORS = 4  # one in so many offspring is measured on all windows


@dataclass(frozen=True)
class Best:
    """The best plan after some generations, and its loss on all windows."""

    generation: int
    counts: Counts
    loss: float


@dataclass(frozen=True)
class Space:
    """What the search may choose from: levels, the price of what each leaves, and the most that all may cost."""

    grids: Grids
    prices: Table
    budget: float


def evolve(
    space: Space, start: Best, measure: Measure, generations: Iterable[int], offspring: int, seed: int
) -> Iterator[Best]:
    """The best plan after every generation.

    A generation's offspring depend on the best plan and on its own number only, so that a search goes on from any
    `Best` as if it had not been interrupted.

    Args:
        start: with its loss on all windows.
        generations: numbers of those to run, rising.
        offspring: plans that are tried in each.
    """
    best = start
    for number in generations:
        draw = random.Random(f"{seed} {number}")
        plans = distinct_offspring(space, best.counts, offspring, draw)
        ranked = sorted(plans, key=lambda counts: measure(counts, FEW))
        for counts in ranked[: -(-len(ranked) // SURVIVORS)]:
            loss = measure(counts, 1.0)
            if loss < best.loss:
                best = Best(number, counts, loss)
        yield Best(number, best.counts, best.loss)


def distinct_offspring(space: Space, parent: Counts, count: int, draw: random.Random) -> list[Counts]:
    """At most `count` different plans within the budget, none of them the parent."""
    plans: dict[tuple, Counts] = {}
    for _ in range(8 * count):
        child = mutated(space, parent, draw)
        if child is not None and child != parent:
            plans.setdefault(tuple(child.values()), child)
        if len(plans) == count:
            break
    return list(plans.values())


def mutated(space: Space, parent: Counts, draw: random.Random) -> Counts | None:
    """One to three blocks or kinds moved by a level, and others moved so that the budget is met; None if it is not."""
    counts = dict(parent)
    for _ in range(draw.choice((1, 1, 2, 3))):
        key = draw.choice(list(counts))
        steps = neighbour(space.grids, counts, key, draw.choice((-1, 1)))
        if steps is not None:
            counts[key] = steps
    return repaired(space, counts, draw)


def repaired(space: Space, counts: Counts, draw: random.Random) -> Counts | None:
    """The plan, with random level changes that bring its price to the budget or `SLACK` below; None if none do."""
    slack, price = SLACK * space.budget, total_price(space.prices, counts)
    counts = dict(counts)
    for _ in range(REPAIRS):
        gap = space.budget - price
        if 0 <= gap <= slack:
            return counts
        changes = []
        for key, steps in counts.items():
            moved = neighbour(space.grids, counts, key, -1 if gap > 0 else 1)
            if moved is not None:
                rise = space.prices[key][moved] - space.prices[key][steps]
                if abs(gap - rise) < abs(gap):
                    changes.append((key, moved, rise))
        if not changes:
            return None
        key, moved, rise = draw.choice(changes)
        counts[key], price = moved, price + rise
    return None
