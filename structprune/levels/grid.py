"""Which widths of a block are levels: a few removal steps on both sides of a plan's, and the whole part."""

from collections.abc import Sequence

from structprune.models.adapter import UnitKey
from structprune.structured.allocate import Counts, most_channels
from structprune.structured.sizes import BlockSize

Grids = dict[UnitKey, tuple[int, ...]]  # (block, kind) -> removal steps of its levels, ascending


def level_grids(
    sizes: list[BlockSize], plans: Sequence[Counts], multiple: int, per_side: int, spread: float, whole: bool
) -> Grids:
    """Levels around the removal steps of some plans.

    Args:
        plans: counts of every block and kind in `sizes`; each is a level.
        multiple: of the remaining MLP widths between a plan's and the whole.
        per_side: levels below a plan's count, and as many above.
        spread: share of a block's units between a plan's count and its farthest level.
        whole: whether the whole attention or MLP may go, which is a level of its own.
    """
    grids: Grids = {}
    for size in sizes:
        for kind, steps in size.steps.items():
            unit = multiple if kind == "channels" else 1
            stride = max(unit, round(spread * steps / per_side / unit) * unit)
            most = most_channels(size, multiple) if kind == "channels" else steps - 1
            levels = {steps} if whole else set()
            for counts in plans:
                center = counts[size.index, kind]
                around = range(center - per_side * stride, center + per_side * stride + 1, stride)
                levels |= {center, *(clipped(count, most, steps, unit) for count in around)}
            grids[size.index, kind] = tuple(sorted(levels))
    return grids


def clipped(count: int, most: int, steps: int, unit: int) -> int:
    """The nearest count from 0 to `most` that leaves a multiple of `unit`, or removes nothing."""
    count = min(max(count, 0), most)
    if count == 0:
        return 0
    return min(max(steps - round((steps - count) / unit) * unit, 0), most)


def neighbour(grids: Grids, counts: Counts, key: UnitKey, direction: int) -> int | None:
    """The next level of `key` above (1) or below (-1) its count; None at the end of the grid."""
    place = grids[key].index(counts[key]) + direction
    return grids[key][place] if 0 <= place < len(grids[key]) else None
