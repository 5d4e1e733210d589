"""From removal paths to a choice: the counts that an allocation and split allow, and the one to use."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from structprune.config import StructuredSettings
from structprune.errors import UserError
from structprune.models.adapter import EXPERTS, UNIT_KINDS, Adapter, BlockView, ExpertWidths, UnitKey
from structprune.models.experts_structprune import SHARED
from structprune.structured.allocate import (
    Counts,
    check_ratio,
    chosen_heads,
    depth_ratios,
    equal_heads,
    fixed_counts,
    head_choices,
    joint_counts,
    most_heads,
    most_ratio,
    path_cost,
    ranked_choices,
    ratio_of,
)
from structprune.structured.paths import RemovalPath
from structprune.structured.sizes import BlockSize, block_size, rounding


@dataclass(frozen=True)
class Choice:
    """The chosen counts of unprotected blocks, and the measurements behind them.

    Attributes:
        split: the rule that chose, as in the configuration.
        measured: attention steps per block -> held-out loss of that candidate (split `measured` only).
    """

    counts: Counts
    split: str
    measured: dict[int, float]

    def plain(self, sizes: list[BlockSize]) -> dict:
        """As plain data: the rule, the measurements, the ratio met, and the removed steps per kind and block."""
        steps = {kind: [self.counts.get((size.index, kind), 0) for size in sizes] for kind in UNIT_KINDS}
        met = {"ratio": ratio_of(sizes, self.counts), "blocks": [size.index for size in sizes]}
        fixed = fixed_counts(sizes)
        for kind in dict.fromkeys(kind for _, kind in fixed):
            steps[kind] = [fixed.get((size.index, kind), 0) for size in sizes]
        return {"split": self.split, "measured": self.measured, **met, **steps}


def open_blocks(adapter: Adapter, settings: StructuredSettings) -> list[BlockSize]:
    """Sizes of the blocks that are not protected.

    Raises:
        UserError: every block is protected.
    """
    count = len(adapter.blocks)
    first, last = settings.protect_first, settings.protect_last
    if first + last >= count:
        raise UserError(f"protect_first {first} + protect_last {last} leave none of {count} blocks to prune")
    blocks = adapter.blocks[first : count - last]
    check_experts(blocks, settings.experts)
    check_shared(blocks, settings.shared)
    return [block_size(block, settings.gqa, settings.experts, settings.shared) for block in blocks]


def check_experts(blocks: list[BlockView], experts: int) -> None:
    """Raise UserError where blocks have no `experts` to spare: a token must get as many as before.

    Where it chooses among groups of experts, all groups lose as many.
    """
    if not experts:
        return
    mixtures = [block.mixture for block in blocks if block.mixture]
    if not mixtures:
        raise UserError(f"structured.experts = {experts}, but no block to prune has experts: leave it out")
    spare = min(each.experts - each.router.least for each in mixtures)
    if experts > spare:
        raise UserError(f"structured.experts = {experts} leaves a token too few to choose from: give 0 to {spare}")
    groups = mixtures[0].router.groups
    if experts % groups:
        choice = f"structured.experts = {experts} does not take as many of each of the {groups} groups of experts"
        raise UserError(f"{choice}: give a multiple of {groups} up to {spare}")


def check_shared(blocks: list[BlockView], channels: int) -> None:
    """Raise UserError where blocks have not so many `channels` that all tokens go through, beside experts."""
    if not channels:
        return
    widths = [block.widths.shared for block in blocks if isinstance(block.widths, ExpertWidths) and block.mixture]
    if not any(widths):
        raise UserError(f"structured.shared = {channels}, but no block to prune has shared experts: leave it out")
    if channels > (most := min(filter(None, widths))):
        raise UserError(f"structured.shared = {channels} is more than shared experts have: give 0 to {most} channels")


def channel_multiple(sizes: list[BlockSize], settings: StructuredSettings) -> int:
    """The multiple that remaining MLP widths have; 1 where no block has an MLP.

    Raises:
        UserError: it is below 1 or above the narrowest MLP.
    """
    width = min((size.steps["channels"] for size in sizes if "channels" in size.steps), default=0)
    if not width:
        return 1
    multiple = rounding(width, settings.round_to)
    if not 1 <= multiple <= width:
        raise UserError(f"structured.round_to = {settings.round_to}: MLPs are {width} wide, give 1 to {width}")
    return multiple


def candidates(
    sizes: list[BlockSize], settings: StructuredSettings, paths: dict[UnitKey, RemovalPath] | None = None
) -> dict[int, Counts]:
    """Attention steps -> counts: per block under `uniform` and `depth`, over all blocks under `global`.

    Args:
        paths: needed under `global` only.
    Raises:
        UserError: a ratio outside [0, 1), or one that no plan meets.
    """
    check_ratio(settings.ratio)
    multiple = channel_multiple(sizes, settings)
    if settings.allocation == "global":
        fixed = settings.split if isinstance(settings.split, int) else None
        assert paths is not None, "global allocation ranks paths"
        return ranked_choices(sizes, paths, settings.ratio, multiple, fixed=fixed)
    slope = settings.depth_slope if settings.allocation == "depth" else 0.0
    ratios = depth_ratios(len(sizes), settings.ratio, slope)
    if not 0 <= min(ratios) <= max(ratios) < 1:
        raise UserError(f"structured.depth_slope = {slope} takes a block's ratio outside [0, 1): lower it")
    return head_choices(sizes, ratios, multiple)


def check_split(settings: StructuredSettings) -> None:
    """Raise UserError for a joint ranking of heads and channels under an allocation without one."""
    if settings.split == "joint" and settings.allocation != "global":
        raise UserError(f"structured.split = joint needs structured.allocation = global, not {settings.allocation}")


def check_choice(sizes: list[BlockSize], settings: StructuredSettings) -> None:
    """Raise UserError for a ratio, split or rounding that no plan can have, as far as sizes alone tell."""
    check_ratio(settings.ratio)
    check_split(settings)
    gone = sum(size.gone for size in sizes) / sum(size.total for size in sizes)
    if gone > settings.ratio:
        fixed = {f"structured.{kind}": getattr(settings, kind) for kind in (EXPERTS, SHARED)}
        given = [f"{key} = {value}" for key, value in fixed.items() if value]
        choice = f"{' and '.join(given)} {'takes' if len(given) == 1 else 'take'} a share of {gone:.4f}"
        raise UserError(f"{choice}, more than ratio {settings.ratio}: lower it, or raise the ratio")
    if settings.allocation != "global":
        choices = candidates(sizes, settings)
        if isinstance(settings.split, int):
            chosen_heads(settings.split, choices)
        return
    most = most_ratio(sizes, channel_multiple(sizes, settings))
    if settings.ratio > most:
        raise UserError(f"no plan meets ratio {settings.ratio:.4f}: the most is {most:.4f}")
    total = most_heads(sizes)
    if isinstance(settings.split, int) and not 0 <= settings.split <= total:
        raise UserError(
            f"structured.split = {settings.split} does not fit: over all blocks 0 to {total} attention steps can go"
        )


def choose_counts(
    sizes: list[BlockSize],
    paths: dict[UnitKey, RemovalPath],
    settings: StructuredSettings,
    measure: Callable[[Counts], float],
) -> Choice:
    """Counts that meet the ratio by allocation and split; only `measured` calls `measure`, for a held-out loss."""
    rule = settings.split
    check_split(settings)
    if rule == "joint":
        check_ratio(settings.ratio)
        counts = joint_counts(sizes, paths, settings.ratio, channel_multiple(sizes, settings))
        return Choice(counts | fixed_counts(sizes), rule, {})
    choices = candidates(sizes, settings, paths)
    choices = {heads: counts | fixed_counts(sizes) for heads, counts in choices.items()}
    losses: dict[int, float] = {}
    if isinstance(rule, int):
        heads = chosen_heads(rule, choices)
    elif rule == "equal":
        heads = equal_heads(sizes, settings.ratio, choices)
    elif rule == "by-cost" or settings.ratio == 0:
        heads = min(choices, key=lambda heads: path_cost(choices[heads], paths))
    else:
        losses = search_heads(choices, lambda heads: measure(choices[heads]), settings.split_candidates)
        heads = min(losses, key=losses.__getitem__)
    return Choice(choices[heads], str(rule), losses)


def search_heads(
    feasible: Iterable[int], measure: Callable[[int], float], coarse: int = 8, halvings: int = 2
) -> dict[int, float]:
    """Losses of the candidates that a descent visits; the best is `min(losses, key=losses.get)`.

    It starts at the fewest heads and goes up in about `coarse` even strides until two candidates in a row are
    worse than the best. Then it tries both sides of the best, `halvings` times at half the stride.

    Args:
        feasible: numbers of attention steps that a plan can remove.
        measure: attention steps -> held-out loss; called once per candidate.
    """
    choices = sorted(set(feasible))
    stride = max(1, round(len(choices) / coarse))
    losses: dict[int, float] = {}
    worse = 0
    for heads in choices[::stride]:
        best = min(losses.values(), default=float("inf"))
        losses[heads] = measure(heads)
        worse = 0 if losses[heads] < best else worse + 1
        if worse == 2:
            break
    for _ in range(halvings):
        if stride == 1:
            break
        stride //= 2
        place = choices.index(min(losses, key=losses.__getitem__))
        for near in (place - stride, place + stride):
            if 0 <= near < len(choices) and choices[near] not in losses:
                losses[choices[near]] = measure(choices[near])
    return losses
