"""How much goes where: removal steps per block and kind that meet a ratio. Pure functions of sizes and paths."""

import heapq
import math

from structprune.criteria.paths import KINDS, RemovalPath
from structprune.errors import UserError
from structprune.structured.sizes import BlockSize

Counts = dict[tuple[int, str], int]  # (block, kind) -> removal steps


def ratio_of(sizes: list[BlockSize], counts: Counts) -> float:
    """Removed share of the parameters of all blocks in `sizes`."""
    removed = sum(counts[size.index, kind] * size.step[kind] for size in sizes for kind in KINDS)
    return removed / sum(size.total for size in sizes)


def check_ratio(ratio: float) -> None:
    """Raises UserError unless 0 <= ratio < 1."""
    if not (isinstance(ratio, (int, float)) and math.isfinite(ratio) and 0 <= ratio < 1):
        raise UserError(f"ratio {ratio} lies outside [0, 1): give the share to remove, such as 0.5")


def most_channels(size: BlockSize, multiple: int) -> int:
    """Channels that may go from a block so that a positive multiple of `multiple` stays (at least one)."""
    return size.steps["channels"] - min(multiple, size.steps["channels"])


def channel_steps(size: BlockSize, wanted: float, multiple: int) -> int:
    """Removed channels nearest to `wanted` parameters such that the kept width is a multiple of `multiple`.

    May lie outside what the block has: the caller decides.
    """
    width = size.steps["channels"]
    kept = width - wanted / size.step["channels"]
    return width - round(kept / multiple) * multiple


def depth_ratios(count: int, ratio: float, slope: float) -> list[float]:
    """Block ratios falling linearly by `slope` from the first to the last block, `ratio` on average."""
    if count == 1:
        return [ratio]
    return [ratio + slope * (0.5 - index / (count - 1)) for index in range(count)]


def split_counts(sizes: list[BlockSize], ratios: list[float], heads: float, multiple: int) -> Counts | None:
    """Counts with `heads` attention steps per block on average and channels making up each block's ratio.

    Rounding errors of heads and of parameters are carried to the next block.

    Args:
        ratios: one per block.
        heads: mean attention steps; blocks get shares in proportion to their ratios.
    Returns:
        None where a block would lose more (or less) than it has.
    """
    counts: Counts = {}
    mean = sum(ratios) / len(ratios)
    head_debt = parameter_debt = 0.0
    for size, ratio in zip(sizes, ratios, strict=True):
        exact = (heads * ratio / mean if mean > 0 else 0.0) + head_debt
        steps = round(exact)
        head_debt = exact - steps
        wanted = ratio * size.total + parameter_debt - steps * size.step["attention"]
        channels = channel_steps(size, wanted, multiple)
        if channels < 0 or channels > most_channels(size, multiple) or not 0 <= steps < size.steps["attention"]:
            return None
        uniform = all(value == ratio for value in ratios)
        parameter_debt = 0.0 if uniform else wanted - channels * size.step["channels"]
        counts[size.index, "attention"], counts[size.index, "channels"] = steps, channels
    return counts


def global_counts(
    sizes: list[BlockSize], paths: dict[tuple[int, str], RemovalPath], ratio: float, multiple: int
) -> Counts:
    """One ranking over all blocks and kinds, cheapest next step first, until the ratio is met.

    Channels go in runs of `multiple`; a step that would overshoot by more than half is passed over, so that channels
    make up for what whole heads cannot.

    Raises:
        UserError: the blocks cannot lose that much without one being emptied.
    """
    by_index = {size.index: size for size in sizes}
    budget = ratio * sum(size.total for size in sizes)
    counts: Counts = {(size.index, kind): 0 for size in sizes for kind in KINDS}
    queue: list[tuple[float, int, str]] = []

    def run_length(size: BlockSize, kind: str, done: int) -> int:
        if kind == "attention":
            return 1 if done + 1 < size.steps[kind] else 0
        first = size.steps[kind] % multiple if done == 0 else 0
        length = first or multiple
        return length if done + length <= most_channels(size, multiple) else 0

    def push(index: int, kind: str) -> None:
        size, done = by_index[index], counts[index, kind]
        length = run_length(size, kind, done)
        if length:
            path, window = paths[index, kind], slice(done, done + length)
            ranked = path.cost[window].sum() / (length * size.step[kind]) if path.rank is None else path.rank[window].mean()
            heapq.heappush(queue, (float(ranked), index, kind))

    for index, kind in counts:
        push(index, kind)
    while queue and budget > 0:
        _, index, kind = heapq.heappop(queue)
        length = run_length(by_index[index], kind, counts[index, kind])
        taken = length * by_index[index].step[kind]
        if taken > 2 * budget:
            continue  # overshoots by more than it repairs; a smaller step may still fit
        counts[index, kind] += length
        budget -= taken
        push(index, kind)
    smallest = min(size.step["channels"] for size in sizes) * multiple
    if budget > smallest:
        raise UserError(f"ratio {ratio} cannot be met without emptying a block: the most is {ratio_of(sizes, counts):.4f}")
    return counts


def head_choices(sizes: list[BlockSize], ratios: list[float], multiple: int) -> dict[int, Counts]:
    """Attention steps per block -> counts, for every number of steps that a plan can have.

    Raises:
        UserError: no number of heads meets the ratio; names the nearest ratio that can be met.
    """
    found = {}
    for heads in range(min(size.steps["attention"] for size in sizes)):
        counts = split_counts(sizes, ratios, heads, multiple)
        if counts is not None:
            found[heads] = counts
    if not found:
        raise UserError(f"no plan meets ratio {sum(ratios) / len(ratios):.4f}: the most is {most_ratio(sizes, multiple):.4f}")
    return found


def most_ratio(sizes: list[BlockSize], multiple: int) -> float:
    """The ratio at which every block is down to its last attention step and `multiple` channels."""
    counts: Counts = {}
    for size in sizes:
        counts[size.index, "attention"] = size.steps["attention"] - 1
        counts[size.index, "channels"] = most_channels(size, multiple)
    return ratio_of(sizes, counts)


def equal_heads(sizes: list[BlockSize], ratio: float, choices: dict[int, Counts]) -> int:
    """The feasible number of attention steps nearest to the same ratio of heads as of everything."""
    return min(choices, key=lambda heads: (abs(heads - ratio * sizes[0].steps["attention"]), heads))


def path_cost(counts: Counts, paths: dict[tuple[int, str], RemovalPath]) -> float:
    """Predicted loss of a set of removals, in the score's own unit."""
    return float(sum(paths[key].cost[:steps].sum() for key, steps in counts.items()))


def cheapest_heads(choices: dict[int, Counts], paths: dict[tuple[int, str], RemovalPath]) -> int:
    """The number of attention steps whose removals the score predicts to cost least."""
    return min(choices, key=lambda heads: path_cost(choices[heads], paths))


def chosen_heads(asked: int, choices: dict[int, Counts]) -> int:
    """A number of attention steps given by the user.

    Raises:
        UserError: no plan has it; names those that do.
    """
    if asked in choices:
        return asked
    known = ", ".join(map(str, choices))
    raise UserError(f"structured.split = {asked}: at this ratio a plan can remove {known} attention steps per block")
