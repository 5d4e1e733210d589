"""The plan with the least sum of losses within a budget: a multiple-choice knapsack, one level per block and kind."""

import numpy as np

from structprune.models.adapter import UnitKey
from structprune.structured.allocate import Counts

Table = dict[UnitKey, dict[int, float]]  # (block, kind) -> removal steps -> a loss, or a price

BUCKETS = 20_000  # plans that differ in price by less than this part of the budget count as one


def total_price(prices: Table, counts: Counts) -> float:
    """What is left of every block and kind costs together."""
    return sum(prices[key][steps] for key, steps in counts.items())


def knapsack(losses: Table, prices: Table, budget: float) -> Counts | None:
    """The level of every block and kind that minimises the sum of losses within the budget.

    Dynamic programming over pairs of price and loss that no other pair beats in both. Of pairs within a bucket of
    1 / `BUCKETS` of the budget, the one with the least loss stays. Prices are never rounded, so the plan is within the
    budget, and its loss is that of the exact optimum for a budget smaller by at most a bucket per key.

    Args:
        losses: of each level; only levels with a loss are chosen.
        prices: of what each level leaves, in the budget's unit.
    Returns:
        None where even the cheapest levels exceed the budget.
    """
    keys = list(losses)
    cheapest = [min(prices[key][steps] for steps in losses[key]) for key in keys]
    later = np.append(np.cumsum(cheapest[::-1])[::-1][1:], 0.0)  # (keys,) the least that the keys behind must cost
    price, loss = np.zeros(1), np.zeros(1)  # (states,) each
    trail = []
    for key, rest in zip(keys, later):
        levels = list(losses[key])
        grid_price = (price[:, None] + np.array([prices[key][steps] for steps in levels])).ravel()  # (states * levels,)
        grid_loss = (loss[:, None] + np.array([losses[key][steps] for steps in levels])).ravel()  # (states * levels,)
        chosen = _frontier(grid_price, grid_loss, budget - rest, budget / BUCKETS)
        if not len(chosen):
            return None
        price, loss = grid_price[chosen], grid_loss[chosen]
        trail.append((chosen // len(levels), [levels[place] for place in chosen % len(levels)]))
    state, counts = int(loss.argmin()), {}
    for key, (parents, steps) in zip(reversed(keys), reversed(trail)):
        counts[key] = steps[state]
        state = int(parents[state])
    return {key: counts[key] for key in keys}


def _frontier(price: np.ndarray, loss: np.ndarray, most: float, bucket: float) -> np.ndarray:
    """Indices of the states within `most` that none beats in price and loss, thinned to one per bucket of price."""
    inside = np.flatnonzero(price <= most * (1 + 1e-12))
    order = inside[np.lexsort((loss[inside], price[inside]))]
    best = np.minimum.accumulate(loss[order])
    first = np.append(True, best[1:] < best[:-1])[: len(order)]  # where the loss falls
    order = order[first]
    buckets = np.floor(price[order] / bucket) if bucket > 0 else np.arange(len(order))
    last = np.append(buckets[1:] != buckets[:-1], True)[: len(order)]  # the least loss of a bucket comes last
    return order[last]
