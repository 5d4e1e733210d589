"""What each width costs in a budget's unit: parameters or MACs, as sums over the parts of a model."""

from collections.abc import Callable

from structprune.levels.grid import Grids
from structprune.levels.knapsack import Table
from structprune.models.adapter import Adapter, UnitKey
from structprune.structured.allocate import Counts
from structprune.structured.paths import RemovalPath
from structprune.structured.sizes import BlockSize

Price = Callable[[UnitKey, int], float]  # (block, kind), removal steps -> what is left of it costs


def parameter_price(sizes: list[BlockSize]) -> Price:
    """Parameters of what is left of a block's attention or MLP."""
    by_index = {size.index: size for size in sizes}

    def price(key: UnitKey, steps: int) -> float:
        size, kind = by_index[key[0]], key[1]
        return float(size.whole[kind] - size.removed(kind, steps))

    return price


def mac_price(sizes: list[BlockSize], adapter: Adapter, length: int) -> Price:
    """Multiply-accumulates per token of a sequence of `length` tokens, with scores and mixing of the attention heads.

    A bias counts as one, which is what its addition takes at most.
    """
    parameters = parameter_price(sizes)
    steps_of = {size.index: size.steps for size in sizes}

    def price(key: UnitKey, steps: int) -> float:
        linears = parameters(key, steps)
        if key[1] != "attention":
            return linears
        remaining = 1 - steps / steps_of[key[0]]["attention"]  # every step takes equally many query heads
        heads = adapter.blocks[key[0]].widths.query_heads * remaining
        return linears + 2 * heads * adapter.head_dim * length

    return price


def price_table(price: Price, grids: Grids) -> Table:
    """The prices of all levels."""
    return {key: {steps: price(key, steps) for steps in levels} for key, levels in grids.items()}


def fill_budget(
    counts: Counts, paths: dict[UnitKey, RemovalPath], price: Price, budget: float, multiple: int
) -> Counts:
    """The plan with channels given back as long as the budget has room, where the next ones cost most per price.

    Args:
        counts: within the budget. multiple: channels that come back together.
    """
    counts, room = dict(counts), budget - sum(price(key, steps) for key, steps in counts.items())
    while True:
        best = None
        for key, steps in counts.items():
            whole = steps == len(paths[key].steps)
            if key[1] != "channels" or steps == 0 or whole:
                continue
            fewer = max(0, steps - multiple)
            rise = price(key, fewer) - price(key, steps)
            value = float(paths[key].cost[fewer:steps].sum()) / max(rise, 1e-12)
            if rise <= room * (1 + 1e-9) and (best is None or value > best[0]):
                best = (value, key, fewer, rise)
        if best is None:
            return counts
        _, key, fewer, rise = best
        counts[key], room = fewer, room - rise
