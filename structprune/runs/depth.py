"""The search within an export class of equal blocks: how many whole blocks to drop, and how wide the others stay."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from structprune.config import Config
from structprune.errors import UserError
from structprune.evaluation.fidelity import masked_kl, process_divergence
from structprune.levels.library import plain_counts
from structprune.levels.stitch import ReferenceWindows
from structprune.models.modeling_structprune import DiffusionLM
from structprune.runs.parts import drops_part
from structprune.runs.search import SearchContext, reference_windows
from structprune.runs.stages import digest
from structprune.structured.allocate import Counts
from structprune.structured.choose import Choice
from structprune.structured.depth import Trial, dropped_counts, most_dropped, ruled_choices, search_dropped
from structprune.structured.ranking import Paths

Make = Callable[[Counts], DiffusionLM]  # counts -> the model that they leave


@dataclass(frozen=True)
class DropResult:
    """The best plan with a block dropped at least, and all plans that were measured, that of the ranking first."""

    counts: Counts
    paths: Paths
    trials: list[Trial]
    order: dict[int, float]

    def plain(self) -> dict:
        """As plain data: blocks in the order in which they were dropped, and the divergence of every plan."""
        order = [{"block": block, "divergence": loss} for block, loss in self.order.items()]
        return {"order": order, "candidates": [trial.plain() for trial in self.trials]}


def search_drops(context: SearchContext, choice: Choice, cut: Make, refit: Make) -> DropResult:
    """Search for the plan that loses least with equal blocks, fewer of them, at the ratio of the request.

    Losses are divergences from the dense model on held-out windows, under the noise of a search for widths.

    Args:
        choice: the plan of the ranking, in which every block stays.
        cut: removes only. refit: also refits, on as many windows as the measured split does.
    """
    request, settings = context.request, context.request.settings
    with context.streamed(context.model):
        windows = reference_windows(context)

    batch = windows.limits.sequences(*windows.noisy_ids.shape[1:])
    journal = drops_part(context.journal, request, batch)

    def loss(make: Make, counts: Counts) -> float:
        name = f"{'cut' if make is cut else 'refit'}-{digest(plain_counts(counts))}"
        if kept := journal.read(name):
            return kept.notes
        model = make(counts)
        with context.streamed(model):
            value = _divergence(model, windows, batch)
        journal.keep(name, notes=value)
        return value

    order: dict[int, float] = {}

    def next_block(dropped: tuple[int, ...]) -> int:
        """Greedily, the block without which the model, otherwise dense, stays nearest to the dense one."""
        left = [size.index for size in request.sizes if size.index not in dropped]
        tried = context.track(left, f"which block to drop, after {len(dropped)}")
        losses = {block: loss(cut, dropped_counts(request.sizes, (*dropped, block))) for block in tried}
        block = min(losses, key=losses.__getitem__)
        order[block] = losses[block]
        return block

    heads = max((steps for (_, kind), steps in choice.counts.items() if kind == "attention"), default=0)
    trials = search_dropped(
        Trial((), heads, choice.counts, loss(refit, choice.counts)),
        most_dropped(request.sizes, settings),
        lambda dropped: ruled_choices(request.sizes, dropped, settings, context.paths),
        next_block,
        lambda counts: loss(refit, counts),
        context.track,
    )
    best = min(trials[1:], key=lambda trial: trial.loss)
    return DropResult(best.counts, context.paths, trials, order)


def _divergence(model: DiffusionLM, windows: ReferenceWindows, batch: int) -> float:
    """How far a model is from the dense one, in nats per token; infinite where that is no number."""
    noisy, p = windows.noisy_ids, windows.mask_probability  # (N, S, T), (N, S)
    value = process_divergence(masked_kl(model, windows.input_ids, noisy, windows.reference, batch), p, noisy.shape[2])
    value = windows.workers.mean(value, len(noisy))
    return math.inf if math.isnan(value) else value


def check_levels_use(config: Config, directory: Path) -> None:
    """Raise UserError for a directory of levels beside a search that makes none."""
    if config.drops_blocks:
        compat = f"export.compat = {config.export.compat}"
        raise UserError(f"--levels {directory} has no effect with {compat}, whose search makes none: leave it out")
