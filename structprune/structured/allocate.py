"""Removal steps per block and kind that meet a ratio. Pure functions of sizes and paths."""

import heapq
import math

from structprune.errors import UserError
from structprune.models.adapter import EXPERTS, UNIT_KINDS, UnitKey
from structprune.models.experts_structprune import SHARED
from structprune.structured.paths import RemovalPath
from structprune.structured.sizes import BlockSize

Counts = dict[tuple[int, str], int]  # (block, kind) -> removal steps


def ratio_of(sizes: list[BlockSize], counts: Counts) -> float:
    """Removed share of the parameters of all blocks in `sizes`."""
    removed = sum(size.removed(kind, counts[size.index, kind]) for size in sizes for kind in size.step)
    return (removed + _gone(sizes)) / sum(size.total for size in sizes)


def _gone(sizes: list[BlockSize]) -> int:
    """Parameters that go in any case."""
    return sum(size.gone for size in sizes)


def fixed_counts(sizes: list[BlockSize]) -> Counts:
    """What goes in any case, by block: whole experts, and channels of what all tokens go through."""
    experts = {(size.index, EXPERTS): size.experts for size in sizes if size.experts}
    return experts | {(size.index, SHARED): size.shared for size in sizes if size.shared}


def check_ratio(ratio: float) -> None:
    """Raise UserError unless 0 <= ratio < 1."""
    if not (isinstance(ratio, (int, float)) and math.isfinite(ratio) and 0 <= ratio < 1):
        raise UserError(f"ratio {ratio} lies outside [0, 1): give the share to remove, such as 0.5")


def most_channels(size: BlockSize, multiple: int) -> int:
    """Channels that may go from a block so that a positive multiple of `multiple` stays (at least one)."""
    return size.steps["channels"] - min(multiple, size.steps["channels"])


def least_step(sizes: list[BlockSize], multiple: int) -> int:
    """Parameters of the smallest removal: `multiple` channels, or an attention step where no block has an MLP."""
    channels = [size.step["channels"] * multiple for size in sizes if "channels" in size.step]
    return min(channels or [size.step["attention"] for size in sizes if size.step])


def channel_steps(size: BlockSize, parameters: float, multiple: int) -> int:
    """Channels to remove, nearest to `parameters`, such that the remaining width is a multiple of `multiple`.

    The result may exceed what the block has; the caller decides.
    """
    width = size.steps["channels"]
    remaining = width - parameters / size.step["channels"]
    return width - round(remaining / multiple) * multiple


def depth_ratios(count: int, ratio: float, slope: float) -> list[float]:
    """Block ratios falling linearly by `slope` from the first to the last block, `ratio` on average."""
    if count == 1:
        return [ratio]
    return [ratio + slope * (0.5 - index / (count - 1)) for index in range(count)]


def split_counts(sizes: list[BlockSize], ratios: list[float], heads: float, multiple: int) -> Counts | None:
    """Counts with `heads` attention steps per block on average and channels making up each block's ratio.

    Blocks get shares of the heads in proportion to their ratios. Rounding errors of heads and of parameters are carried
    to the next block. What blocks without an MLP cannot lose is spread over the others. None where a block would lose
    more (or less) than it can.
    """
    counts: Counts = {}
    mean = sum(ratios) / len(ratios)
    head_debt = parameter_debt = 0.0
    shares = {
        size.index: ratio * size.total - size.gone for size, ratio in zip(sizes, ratios, strict=True)
    }  # parameters
    budgets = dict(shares)  # what heads leave of them
    for size, ratio in zip(sizes, ratios):
        if "attention" in size.steps:
            exact = (heads * ratio / mean if mean > 0 else 0.0) + head_debt
            steps = round(exact)
            head_debt = exact - steps
            if not 0 <= steps < size.steps["attention"]:
                return None
            counts[size.index, "attention"] = steps
            budgets[size.index] -= steps * size.step["attention"]
    wide = [size for size in sizes if "channels" in size.steps]
    owed = sum(budgets[size.index] for size in sizes if "channels" not in size.steps)
    extra = owed / (sum(shares[size.index] for size in wide) or 1)  # per parameter of a share
    if not wide and abs(owed) > least_step(sizes, multiple) / 2:
        return None
    for size in wide:
        parameters = budgets[size.index] + extra * shares[size.index] + parameter_debt
        channels = channel_steps(size, parameters, multiple)
        if not 0 <= channels <= most_channels(size, multiple):
            return None
        uniform = all(value == ratios[0] for value in ratios)
        parameter_debt = 0.0 if uniform else parameters - channels * size.step["channels"]
        counts[size.index, "channels"] = channels
    return counts


class _Greedy:
    """Removes the cheapest next step over all blocks, and counts the steps."""

    def __init__(self, sizes: list[BlockSize], paths: dict[UnitKey, RemovalPath], multiple: int):
        self.sizes, self.paths, self.multiple = {size.index: size for size in sizes}, paths, multiple
        self.counts: Counts = {(size.index, kind): 0 for size in sizes for kind in size.step}

    def run_length(self, key: tuple[int, str]) -> int:
        """Steps to remove at once: one of attention, or channels down to the next multiple; 0 where none may go."""
        size, done = self.sizes[key[0]], self.counts[key]
        if key[1] == "attention":
            return 1 if done + 1 < size.steps["attention"] else 0
        length = (size.steps["channels"] % self.multiple if done == 0 else 0) or self.multiple
        return length if done + length <= most_channels(size, self.multiple) else 0

    def rank(self, key: tuple[int, str], length: int) -> float:
        path, window = self.paths[key], slice(self.counts[key], self.counts[key] + length)
        if path.rank is not None:
            return float(path.rank[window].mean())
        return float(path.cost[window].sum()) / (length * self.sizes[key[0]].step[key[1]])

    def take(self, kinds: tuple[str, ...], budget: float, most: int | None = None) -> float:
        """Remove steps of some kinds until `budget` parameters or `most` steps are removed; the unused budget.

        A step that overshoots by more than it closes the gap is skipped. A head that overshoots waits until no channels
        remain, because channels fill the budget more finely.
        """
        queue: list[tuple[float, tuple[int, str]]] = []
        late: list[tuple[int, str]] = []
        half = least_step(list(self.sizes.values()), self.multiple) / 2

        def push(key: tuple[int, str]) -> None:
            if length := self.run_length(key):
                heapq.heappush(queue, (self.rank(key, length), key))

        for key in self.counts:
            if key[1] in kinds:
                push(key)
        removed_steps = 0
        while (queue or late) and budget > 0 and removed_steps != most:
            key = heapq.heappop(queue)[1] if queue else late.pop(0)
            length = self.run_length(key)
            parameters = length * self.sizes[key[0]].step[key[1]]
            if parameters > 2 * budget:
                continue
            if queue and key[1] == "attention" and parameters > budget + half:
                late.append(key)
                continue
            self.counts[key] += length
            budget, removed_steps = budget - parameters, removed_steps + 1
            push(key)
        return budget


def joint_counts(sizes: list[BlockSize], paths: dict[UnitKey, RemovalPath], ratio: float, multiple: int) -> Counts:
    """One ranking over all blocks, heads and channels competing by cost per parameter (or by the score's own rank).

    Raises:
        UserError: the blocks cannot lose that much without one being emptied.
    """
    greedy = _Greedy(sizes, paths, multiple)
    unused = greedy.take(UNIT_KINDS, ratio * sum(size.total for size in sizes) - _gone(sizes))
    if unused > least_step(sizes, multiple):
        raise UserError(f"no plan meets ratio {ratio}: the most is {ratio_of(sizes, greedy.counts):.4f}")
    return greedy.counts


def ranked_choices(
    sizes: list[BlockSize],
    paths: dict[UnitKey, RemovalPath],
    ratio: float,
    multiple: int,
    most: int = 65,
    fixed: int | None = None,
) -> dict[int, Counts]:
    """Attention steps over all blocks -> counts: heads ranked over all blocks, then channels make up the ratio.

    Args:
        most: about as many numbers of attention steps are tried, evenly spread.
        fixed: a number that is tried in any case.
    Raises:
        UserError: no number of attention steps meets the ratio.
    """
    budget, choices = ratio * sum(size.total for size in sizes) - _gone(sizes), {}
    total = most_heads(sizes)
    slack = least_step(sizes, multiple)
    tried = set(range(0, total + 1, max(1, -(-total // most))))
    for steps in sorted(tried if fixed is None else tried | {fixed}):
        greedy = _Greedy(sizes, paths, multiple)
        greedy.take(("attention",), float("inf"), most=steps)
        attending = [size for size in sizes if "attention" in size.step]
        removed = sum(size.step["attention"] * greedy.counts[size.index, "attention"] for size in attending)
        if removed > budget + slack / 2:
            break
        if greedy.take(("channels",), budget - removed) <= slack:
            choices[steps] = greedy.counts
    if not choices:
        raise UserError(f"no plan meets ratio {ratio}: the most is {most_ratio(sizes, multiple):.4f}")
    return choices


def head_choices(sizes: list[BlockSize], ratios: list[float], multiple: int) -> dict[int, Counts]:
    """Attention steps per block -> counts, for every number of steps that a plan can have.

    Raises:
        UserError: no number of heads meets the ratio; names the nearest ratio that can be met.
    """
    choices = feasible_heads(sizes, ratios, multiple)
    if not choices:
        ratio, most = sum(ratios) / len(ratios), most_ratio(sizes, multiple)
        if ratio > most and len(set(ratios)) == 1:
            raise UserError(f"no plan meets ratio {ratio:.4f}: the most is {most:.4f}")
        raise UserError(
            f"no plan meets ratio {ratio:.4f}: the nearest is {_nearest_ratio(sizes, ratios, multiple):.4f}"
        )
    return choices


def feasible_heads(sizes: list[BlockSize], ratios: list[float], multiple: int) -> dict[int, Counts]:
    """As `head_choices`, empty where no number of heads meets the ratios."""
    tried = range(min((size.steps["attention"] for size in sizes if "attention" in size.steps), default=1))
    choices = {heads: split_counts(sizes, ratios, heads, multiple) for heads in tried}
    return {heads: counts for heads, counts in choices.items() if counts is not None}


def _nearest_ratio(sizes: list[BlockSize], ratios: list[float], multiple: int, grid: float = 0.0025) -> float:
    """The nearest mean ratio that block ratios shifted alike can meet, to within `grid`; 0 where there is none."""
    for shift in (sign * step * grid for step in range(1, round(1 / grid)) for sign in (-1, 1)):
        shifted = [ratio + shift for ratio in ratios]
        if 0 <= min(shifted) <= max(shifted) < 1 and feasible_heads(sizes, shifted, multiple):
            return sum(shifted) / len(shifted)
    return 0.0


def most_ratio(sizes: list[BlockSize], multiple: int) -> float:
    """The ratio at which every block is down to its last attention step and `multiple` channels."""
    counts = {(size.index, "attention"): size.steps["attention"] - 1 for size in sizes if "attention" in size.steps}
    wide = [size for size in sizes if "channels" in size.steps]
    return ratio_of(sizes, counts | {(size.index, "channels"): most_channels(size, multiple) for size in wide})


def equal_heads(sizes: list[BlockSize], ratio: float, choices: dict[int, Counts]) -> int:
    """The choice whose share of removed attention steps is nearest to the ratio."""
    total = sum(size.steps.get("attention", 0) for size in sizes)

    def gap(choice: int) -> float:
        removed = sum(steps for (_, kind), steps in choices[choice].items() if kind == "attention")
        return round(abs(removed / max(1, total) - ratio), 9)  # so that rounding errors decide no tie

    return min(choices, key=lambda choice: (gap(choice), choice))


def path_cost(counts: Counts, paths: dict[UnitKey, RemovalPath]) -> float:
    """Predicted loss of a set of removals, in the score's own unit."""
    return float(sum(paths[key].cost[:steps].sum() for key, steps in counts.items()))


def most_heads(sizes: list[BlockSize]) -> int:
    """Attention steps that can be removed over all blocks, which keep one each."""
    return sum(size.steps["attention"] - 1 for size in sizes if "attention" in size.steps)


def chosen_heads(steps: int, choices: dict[int, Counts]) -> int:
    """The number of attention steps that the user gave; UserError where no plan has it, naming those that do."""
    if steps not in choices:
        known = ", ".join(map(str, choices))
        raise UserError(f"structured.split = {steps} does not fit: at this ratio attention steps can be {known}")
    return steps
