"""Equal blocks, fewer of them: the counts that meet a ratio once whole blocks are dropped, and a descent over them.

The ratio is a share of all blocks in `sizes`, and dropped ones count as removed. So the more are dropped, the wider the
others stay.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from structprune.config import StructuredSettings
from structprune.errors import UserError
from structprune.progress import Track
from structprune.structured.allocate import Counts, equal_heads, feasible_heads, path_cost
from structprune.structured.choose import channel_multiple
from structprune.structured.ranking import Paths
from structprune.structured.sizes import BlockSize

STRIDES = 16  # numbers of heads are compared in strides of about this share of all that are possible


@dataclass(frozen=True)
class Trial:
    """A plan that was measured: blocks dropped, in that order, attention steps gone from each other block, its loss."""

    dropped: tuple[int, ...]
    heads: int
    counts: Counts
    loss: float

    def plain(self) -> dict:
        """As plain data, with the MLP channels gone from each remaining block."""
        channels = {steps for (index, kind), steps in self.counts.items()
                    if kind == "channels" and index not in self.dropped}  # fmt: skip
        return {
            "dropped": list(self.dropped), "attention": self.heads, "channels": max(channels, default=0),
            "divergence": self.loss,
        }  # fmt: skip


def dropped_counts(sizes: list[BlockSize], dropped: Iterable[int]) -> Counts:
    """All steps of some blocks, which go as a whole."""
    gone = set(dropped)
    return {(size.index, kind): size.steps[kind] for size in sizes if size.index in gone for kind in size.steps}


def remaining_ratio(sizes: list[BlockSize], dropped: Iterable[int], ratio: float) -> float:
    """The share that the other blocks lose, so that with the dropped ones `ratio` of all is gone; may be negative."""
    gone = set(dropped)
    rest = sum(size.total for size in sizes if size.index not in gone)
    total = sum(size.total for size in sizes)
    return (ratio * total - (total - rest)) / rest


def equal_choices(sizes: list[BlockSize], dropped: Iterable[int], settings: StructuredSettings) -> dict[int, Counts]:
    """Attention steps per remaining block -> counts of the remaining blocks; empty where no plan meets the ratio.

    A fixed `split` leaves one number at most.
    """
    gone = set(dropped)
    rest = [size for size in sizes if size.index not in gone]
    if not rest:
        return {}
    ratio = remaining_ratio(sizes, gone, settings.ratio)
    choices = feasible_heads(rest, [ratio] * len(rest), channel_multiple(sizes, settings))
    if ratio <= 0:  # nothing is left to share out, so that all numbers of heads are the same plan
        choices = {heads: counts for heads, counts in choices.items() if heads == 0}
    if isinstance(settings.split, int):
        choices = {heads: counts for heads, counts in choices.items() if heads == settings.split}
    return choices


def ruled_choices(
    sizes: list[BlockSize], dropped: tuple[int, ...], settings: StructuredSettings, paths: Paths
) -> dict[int, Counts]:
    """As `equal_choices`, only those that the split leaves to be measured, and with the steps of the dropped blocks."""
    choices = equal_choices(sizes, dropped, settings)
    rest = [size for size in sizes if size.index not in dropped]
    if choices and settings.split == "equal":
        heads = equal_heads(rest, remaining_ratio(sizes, dropped, settings.ratio), choices)
        choices = {heads: choices[heads]}
    if choices and settings.split == "by-cost":
        heads = min(choices, key=lambda heads: path_cost(choices[heads], paths))
        choices = {heads: choices[heads]}
    return {heads: counts | dropped_counts(sizes, dropped) for heads, counts in choices.items()}


def most_dropped(sizes: list[BlockSize], settings: StructuredSettings) -> int:
    """Blocks that can be dropped so that the others, alike in size, still meet the ratio."""
    indices = [size.index for size in sizes]
    return next(count for count in range(len(sizes)) if not equal_choices(sizes, indices[: count + 1], settings))


def check_dropped(sizes: list[BlockSize], settings: StructuredSettings) -> None:
    """Raise UserError where a search has nothing to compare: blocks differ, or the ratio has no room for one."""
    if len({(size.total, tuple(size.steps.items())) for size in sizes}) > 1:
        raise UserError(
            "search.enabled = true drops whole blocks of equal ones, and this model's differ in width: set"
            " export.compat = free and structured.allocation = global, or leave the search out"
        )
    if most_dropped(sizes, settings) == 0:
        share = max(size.total for size in sizes) / sum(size.total for size in sizes)
        fixed = (
            f" with structured.split = {settings.split}" if isinstance(settings.split, int) and settings.split else ""
        )
        raise UserError(
            f"search.enabled = true drops whole blocks, and structured.ratio = {settings.ratio}{fixed} has no room for"
            f" one of {len(sizes)}, a share of {share:.4f}: raise the ratio{' or lower the split' if fixed else ''}, or"
            " leave the search out"
        )


def search_dropped(
    start: Trial,
    most: int,
    choices: Callable[[tuple[int, ...]], dict[int, Counts]],
    next_block: Callable[[tuple[int, ...]], int],
    measure: Callable[[Counts], float],
    track: Track,
) -> list[Trial]:
    """Every plan that was measured, `start` first: one more block dropped at a time, and a descent over heads in each.

    It ends with `most` blocks, or after two numbers of blocks in a row that are worse than the best.

    Args:
        start: the plan of a run without a search, which drops no block.
        choices: dropped blocks -> attention steps per remaining block -> counts; the descent starts near the numbers
            that were best with one block more.
        next_block: dropped blocks -> the one to drop next; asked once for each number of them.
        measure: counts -> loss.
    """
    trials, best, worse, dropped, heads = [start], start, 0, start.dropped, start.heads

    def title() -> str:
        return f"blocks dropped (best {best.loss:.4f} nats without {len(best.dropped)})"

    for _ in track(range(most), title):
        dropped = (*dropped, next_block(dropped))
        feasible = choices(dropped)
        losses = descend(feasible, heads, measure)
        trials += [Trial(dropped, heads, feasible[heads], loss) for heads, loss in losses.items()]
        heads = min(losses, key=losses.__getitem__)
        worse = 0 if losses[heads] < best.loss else worse + 1
        best = min(trials, key=lambda trial: trial.loss)
        if worse == 2:
            break
    return trials


def descend(choices: dict[int, Counts], start: int, measure: Callable[[Counts], float]) -> dict[int, float]:
    """Losses of the numbers of heads on the way downhill from the one nearest to `start`, until both sides are worse.

    Args:
        choices: attention steps -> counts.
        measure: called once for each number visited.
    """
    order = sorted(choices)
    stride = max(1, round(len(order) / STRIDES))
    place = min(range(len(order)), key=lambda place: abs(order[place] - start))
    losses = {order[place]: measure(choices[order[place]])}
    while True:
        for near in (place - stride, place + stride):
            if 0 <= near < len(order) and order[near] not in losses:
                losses[order[near]] = measure(choices[order[near]])
        best = order.index(min(losses, key=losses.__getitem__))
        if best == place:
            return losses
        place = best
