"""Pruning to a latency: the table of a run, the ratio at which the ranking's plan meets the target, and its report."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from structprune.bench.latency import Timing, measure_latency, speedup
from structprune.bench.part_latency import measure_table, table_identity
from structprune.bench.settings import Size
from structprune.errors import UserError
from structprune.files import first_line, write_whole
from structprune.levels.latency import LatencyTable, LatencyTarget, narrowest, table_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track
from structprune.runs.resolve import with_ratio
from structprune.runs.search import LATENCY_FILE
from structprune.structured.allocate import Counts, most_ratio
from structprune.structured.choose import Choice, channel_multiple, choose_counts
from structprune.structured.ranking import Paths
from structprune.structured.request import StructuredRequest

TIMING = Timing()  # of the table, and of both models at the end
REMEDY = "delete it with the folders latency-* beside it"
COARSE, HALVINGS = 16, 6  # ratios that are tried, evenly spread, and halvings of the distance between two of them
Choose = Callable[[StructuredRequest], Choice]


def latency_target(
    model: DiffusionLM, request: StructuredRequest, length: int, levels: Path | None, track: Track
) -> LatencyTarget:
    """The target of a request, with the table in `levels` or one that is measured now, and kept there.

    Args:
        length: of the calibration windows, where `search.latency_length` names none.
        levels: directory of levels; None keeps nothing.
    Raises:
        UserError: a target that the dense model meets or the narrowest plan does not, or a table of something else.
    """
    search, multiple = request.config.search, channel_multiple(request.sizes, request.settings)
    assert search.target_ms is not None, "checked with the configuration"
    size = Size(search.latency_batch, search.latency_length or length)
    file = None if levels is None else levels / LATENCY_FILE
    if file is not None and file.exists():
        table = read_table(file, table_identity(model, request.settings.gqa, multiple, size))
    else:
        timing = replace(TIMING, track=lambda items: track(items, "latency"))
        table = measure_table(model, request.settings.gqa, multiple, size, timing)
        if file is not None:
            _write(file, table)
    target = LatencyTarget(search.target_ms, table)
    _check_reach(target, narrowest(request.sizes, multiple), size)
    return target


def _write(file: Path, table: LatencyTable) -> None:
    try:
        write_whole(file, (json.dumps(table.plain(), indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{file} cannot be written ({first_line(error)}): give another directory of levels") from error


def read_table(file: Path, identity: dict) -> LatencyTable:
    """The table in a file.

    Raises:
        UserError: it cannot be read, or was measured for something else than `identity`.
    """
    try:
        table = table_of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no table of latencies ({first_line(error)}): {REMEDY}") from error
    if keys := [key for key, value in identity.items() if table.identity.get(key) != value]:
        before, now = table.identity.get(keys[0]), identity[keys[0]]
        values = "" if keys[0] == "model" else f" ({before}, now {now})"
        raise UserError(f"{file} was measured for another {keys[0]}{values}: give another directory, or {REMEDY}")
    return table


def _check_reach(target: LatencyTarget, least: Counts, size: Size) -> None:
    """Raise UserError for a target above the dense model's time or below that of the narrowest plan."""
    table = target.table
    if target.met({}):
        raise UserError(
            f"search.target_ms = {target.ms:g} leaves nothing to remove, the dense model takes {table.dense:.3f} ms"
            f" ({size} tokens): give less"
        )
    if not target.met(least):
        raise UserError(
            f"search.target_ms = {target.ms:g} cannot be met: the narrowest plan takes {table.total(least):.3f} ms and"
            f" the dense model {table.dense:.3f} ({size} tokens): give more"
        )


def choose_for_latency(
    target: LatencyTarget, request: StructuredRequest, paths: Paths, choose: Choose
) -> tuple[StructuredRequest, Choice]:
    """The ranking's plan at the smallest ratio that meets the target, and the request at that ratio.

    A measured split is chosen at the ratio that a split by cost takes. Then the ratio is looked for again with its
    number of attention steps: an attention step costs other time per parameter than channels do.

    Args:
        choose: the choice at a ratio, with the configured split.
    Raises:
        UserError: no plan with the configured number of attention steps meets the target.
    """
    settings, sizes = request.settings, request.sizes
    if isinstance(settings.split, int):
        if (choice := _smallest(target, request, paths, settings.split)) is None:
            raise UserError(
                f"no plan with structured.split = {settings.split} takes search.target_ms = {target.ms:g} or less: give"
                " more, or another split"
            )
        return choice
    rule = "by-cost" if settings.split == "measured" else settings.split
    multiple = channel_multiple(sizes, settings)
    result = _smallest(target, request, paths, rule)
    if result is None:  # no ratio that was tried does: the narrowest plan always will
        return with_ratio(request, most_ratio(sizes, multiple)), Choice(narrowest(sizes, multiple), rule, {})
    if settings.split != "measured":
        return result
    measured = choose(result[0])
    steps = sum(count for (_, kind), count in measured.counts.items() if kind == "attention")
    if (at_steps := _smallest(target, request, paths, steps)) is None:
        return result
    return at_steps[0], replace(at_steps[1], split=measured.split, measured=measured.measured)


def latency_report(target: LatencyTarget, dense: DiffusionLM, small: DiffusionLM, counts: Counts) -> dict:
    """Target, predicted times, and times of both models measured in turns, as plain data; milliseconds.

    Args:
        counts: the plan of `small`.
    """
    table = target.table
    batch, length = table.identity["batch"], table.identity["length"]
    measured = measure_latency({"dense": dense, "pruned": small}, length, batch, TIMING)
    return {
        "target_ms": target.ms,
        "batch": batch,
        "length": length,
        "predicted": {"before": table.dense, "after": table.total(counts)},
        "measured": {"before": measured["dense"].median_ms, "after": measured["pruned"].median_ms},
        "quartiles": {name: latency.quartiles_ms() for name, latency in measured.items()},
        "speedup": speedup(measured["dense"], measured["pruned"]),
        "table": table.plain(),
    }


def _smallest(
    target: LatencyTarget, request: StructuredRequest, paths: Paths, split: str | int
) -> tuple[StructuredRequest, Choice] | None:
    """The request and choice at about the smallest ratio whose plan meets the target; None where no ratio does.

    Not every ratio has a plan with a given number of attention steps, and time falls with the ratio only on the whole.
    So evenly spread ratios are tried from below, and the step to the first that will do is halved.
    """
    most = most_ratio(request.sizes, channel_multiple(request.sizes, request.settings))
    low, best = 0.0, None
    for number in range(1, COARSE + 1):
        ratio = most * number / COARSE
        best = _choice_at(target, request, paths, ratio, split)
        if best is not None:
            break
        low = ratio
    if best is None:
        return None
    for _ in range(HALVINGS):
        middle = (low + best[0].settings.ratio) / 2
        choice = _choice_at(target, request, paths, middle, split)
        low, best = (low, choice) if choice is not None else (middle, best)
    return best


def _choice_at(
    target: LatencyTarget, request: StructuredRequest, paths: Paths, ratio: float, split: str | int
) -> tuple[StructuredRequest, Choice] | None:
    """The request and choice at a ratio, by a split that measures nothing; None where no plan meets the target."""
    own = with_ratio(request, ratio)
    try:
        choice = choose_counts(request.sizes, paths, own.settings.model_copy(update={"split": split}), _unmeasured)
    except UserError:  # no plan has this ratio and split
        return None
    return (own, choice) if target.met(choice.counts) else None


def _unmeasured(counts: Counts) -> float:
    raise AssertionError("a split that measures nothing")
