"""The search for widths: rounds of a library of levels around the current plan, and of changes that lower its loss.

A round measures what replacing one level at a time does to the predictions, combines the levels by a knapsack, and
improves the plan by evolution. The next round's library is built around the best plan, with levels half as far apart.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from structprune.config import SearchSettings
from structprune.errors import UserError
from structprune.levels.evolve import Best, Measure, Space, evolve
from structprune.levels.grid import Grids, level_grids
from structprune.levels.knapsack import Table, knapsack, total_price
from structprune.levels.library import Library, counts_of, plain_counts, plain_grids
from structprune.levels.losses import LOSSES, LossFile
from structprune.levels.prices import Price, price_table
from structprune.levels.stitch import StitchedModel
from structprune.models.adapter import UNIT_KINDS
from structprune.models.journal import unwatched
from structprune.progress import Track
from structprune.structured.allocate import Counts
from structprune.structured.sizes import BlockSize
from structprune.workers import ALONE, Workers

# builds what the library lacks, around its plan, and stitches the plan given from it; the model is placed for its
# passes while the context is open
Stitch = Callable[[Library, Counts], AbstractContextManager[StitchedModel]]


@dataclass(frozen=True)
class Task:
    """What to search for, and with what.

    Attributes:
        sizes: of the blocks that may lose units. multiple: of remaining MLP widths.
        price: of what is left of a block's attention or MLP. budget: the most that all may cost.
        identity: plain data that decides the levels, beside grids and current plan.
        losses: plain data that decides the losses, beside those.
        plans: that share the first library; the middle one is its prefix. Empty: only the plan that a search starts at.
        workers: the processes that search together; the first one writes.
        watch: called before every loss, by all of them together; what it raises ends the search.
    """

    settings: SearchSettings
    sizes: list[BlockSize]
    multiple: int
    price: Price
    budget: float
    seed: int
    identity: dict = field(default_factory=dict)
    losses: dict = field(default_factory=dict)
    plans: tuple[Counts, ...] = ()
    workers: Workers = ALONE
    watch: Callable[[], None] = unwatched


@dataclass(frozen=True)
class Places:
    """Directories of the first library, which tasks share, and of the rest: later libraries, and all losses."""

    first: Path
    own: Path


@dataclass(frozen=True)
class Round:
    """One round: its library, the best plan, and the losses on the way there, divergence in nats per token."""

    library: Library
    counts: Counts
    losses: dict[str, float]


def search_rounds(task: Task, start: Counts, stitch: Stitch, places: Places, track: Track) -> Iterator[Round]:
    """Every round's best plan.

    Args:
        start: a plan within the budget. Where the first library has no such levels, the nearest plan takes its place.
        places: what an earlier, interrupted search left there is used again.
    Raises:
        UserError: the first library is there already, and all of its plans are beyond the budget.
    """
    counts = start
    for number in range(task.settings.rounds):
        library, grids = _first_library(task, counts, places) if number == 0 else _library(task, number, counts, places)
        space = Space(grids, price_table(task.price, grids), task.budget)
        if number == 0:
            counts = nearest_plan(space, task.price, counts, library.directory)
        result = _round(task, number, (library, counts, space), stitch, (places.own / round_name(number), track))
        counts = result.counts
        yield result


def round_name(number: int) -> str:
    """The directory of a round, counted from 0."""
    return f"round-{number + 1}"


def _first_library(task: Task, start: Counts, places: Places) -> tuple[Library, Grids]:
    """The first round's library, and those of its levels that are nearest to levels around the start.

    It may be of other plans: what is there is used as it is.
    """
    settings, plans = task.settings, task.plans or (start,)
    rule = (task.multiple, settings.levels, settings.spread, settings.whole)
    grids = level_grids(task.sizes, plans, *rule)
    library = task.workers.in_turn(lambda: Library(places.first, task.identity, grids, plans[len(plans) // 2]))
    return library, nearest_levels(library.grids, level_grids(task.sizes, [start], *rule))


def _library(task: Task, number: int, counts: Counts, places: Places) -> tuple[Library, Grids]:
    """A later round's library, around the best plan, with levels half as far apart as the round's before."""
    settings = task.settings
    spread = settings.spread / 2**number
    grids = level_grids(task.sizes, [counts], task.multiple, settings.levels, spread, settings.whole)
    identity = task.identity | {"grids": plain_grids(grids), "plan": plain_counts(counts)}
    return task.workers.in_turn(lambda: Library(places.own / round_name(number), identity, grids, counts)), grids


def nearest_levels(grids: Grids, aims: Grids) -> Grids:
    """The levels of `grids` that are nearest to those of `aims`."""
    return {
        key: tuple(sorted({min(levels, key=lambda steps: (abs(steps - aim), steps)) for aim in aims[key]}))
        for key, levels in grids.items()
    }


def nearest_plan(space: Space, price: Price, counts: Counts, directory: Path) -> Counts:
    """The plan of levels within the budget that is nearest to `counts`, by squares of differences in price.

    Raises:
        UserError: none is within the budget.
    """
    gaps = {
        key: {steps: (price(key, steps) - price(key, counts[key])) ** 2 for steps in levels}
        for key, levels in space.grids.items()
    }
    plan = knapsack(gaps, space.prices, space.budget)
    if plan is None:
        raise UserError(f"the levels in '{directory}' are all too wide for this ratio: give another directory")
    return plan


def _round(
    task: Task, number: int, state: tuple[Library, Counts, Space], stitch: Stitch, place: tuple[Path, Track]
) -> Round:
    settings, (directory, track), (library, counts, space) = task.settings, place, state
    layout = {"grids": plain_grids(space.grids), "plan": plain_counts(counts), "prefix": plain_counts(library.plan)}
    identity = task.identity | task.losses | layout
    record = task.workers.in_turn(lambda: LossFile(directory / LOSSES, identity, task.workers.main))
    with stitch(library, counts) as stitched:
        measure = finite_losses(stitched.loss, task)
        first = record.value("start", lambda: measure(counts, 1.0))
        if math.isinf(first):
            raise UserError("the plan's divergence from the dense model is no number: use model.dtype = float32")
        losses = {"start": first}
        best = Best(-1, counts, first)
        if settings.method != "evolution":
            table = replacement_losses(space.grids, counts, first, measure, record, track)
            best, losses["knapsack"] = best_combination(space, best, table, measure, record)
        if settings.method != "knapsack":
            best = _evolve(space, best, measure, (settings, task.seed + number), record, track)
            losses["evolution"] = best.loss
    return Round(library, best.counts, losses)


def finite_losses(measure: Measure, task: Task) -> Measure:
    """A measure that is infinite for plans without any attention or any MLP, which no model may be, and for NaN."""

    def loss(counts: Counts, share: float) -> float:
        task.watch()
        for kind in UNIT_KINDS:
            left = [size.steps[kind] - counts[size.index, kind] for size in task.sizes if kind in size.steps]
            if left and not any(left):
                return math.inf
        value = measure(counts, share)
        return math.inf if math.isnan(value) else value

    return loss


def replacement_losses(
    grids: Grids, counts: Counts, loss: float, measure: Measure, record: LossFile, track: Track
) -> Table:
    """What every level does to the loss where it replaces the current one: measured loss minus the current, in nats.

    Args:
        loss: the current plan's.
        measure: is asked once per level that differs, unless `record` has it.
    """
    table: Table = {key: {counts[key]: 0.0} for key in grids}
    changes = [(key, steps) for key, levels in grids.items() for steps in levels if steps != counts[key]]
    for key, steps in track(changes, "replacement losses"):
        name = f"{key[0]} {key[1]} {steps}"
        table[key][steps] = record.value(name, partial(measure, counts | {key: steps}, 1.0)) - loss
    return table


def best_combination(space: Space, best: Best, losses: Table, measure: Measure, record: LossFile) -> tuple[Best, float]:
    """The plan of least predicted loss, or a more cautious one, if measuring it shows a gain; and its measured loss.

    Losses of single replacements add up only for small changes. So where the knapsack over all levels is worse than
    the current plan, it is solved again over the levels next to the current ones.
    """
    results = []
    for reach in (None, 1):
        plan = knapsack(near_levels(losses, best.counts, reach), space.prices, space.budget)
        assert plan is not None, "the current plan is within the budget"
        loss = record.value(f"knapsack {reach}", partial(measure, plan, 1.0))
        results.append((loss, plan))
        if loss < best.loss:
            break
    loss, plan = min(results, key=lambda result: result[0])
    return (replace(best, counts=plan, loss=loss) if loss < best.loss else best), loss


def near_levels(losses: Table, counts: Counts, reach: int | None) -> Table:
    """The losses of levels at most `reach` places from the current one (None: all)."""
    if reach is None:
        return losses
    near: Table = {}
    for key, levels in losses.items():
        order = sorted(levels)
        place = order.index(counts[key])
        near[key] = {steps: levels[steps] for steps in order[max(0, place - reach) : place + reach + 1]}
    return near


def _evolve(
    space: Space, best: Best, measure: Measure, settings: tuple[SearchSettings, int], record: LossFile, track: Track
) -> Best:
    """The best plan after all generations; those that `record` has are not run again."""
    (search, seed), done = settings, record.generations
    if done:
        best = Best(len(done) - 1, counts_of(done[-1]["plan"]), done[-1]["loss"])
    generations = track(range(len(done), search.generations), lambda: f"evolution ({best.loss:.4f} nats)")
    for result in evolve(space, best, measure, generations, search.offspring, seed):
        record.add_generation({"plan": plain_counts(result.counts), "loss": result.loss})
        best = result
    assert total_price(space.prices, best.counts) <= space.budget * (1 + 1e-9)
    return best
