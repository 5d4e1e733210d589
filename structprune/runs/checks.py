"""What a run of `structprune prune` refuses before weights are read: settings, text, places, and disks too full."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir

from structprune.bench.work_size import mask_work_bytes, structured_work_bytes
from structprune.calibration.build import check_length, check_source
from structprune.calibration.trajectories import check_calibration
from structprune.checkpoint.output import Room, check_output, check_rooms
from structprune.config import Config
from structprune.errors import UserError
from structprune.levels.cost import search_cost
from structprune.masking.request import MaskRequest
from structprune.runs.budget import predicted_memory, within_memory
from structprune.runs.depth import check_levels_use
from structprune.runs.ghost import Ghost, read_ghost
from structprune.runs.resolve import (
    at_ratio,
    block_weights,
    check_given_plan,
    resolve_masking,
    resolve_structured,
    with_ratio,
)
from structprune.runs.search import check_levels_directory
from structprune.runs.work import NO_WORK, Work, check_work, kept_bytes, work_identity
from structprune.structured.plan import Plan
from structprune.structured.request import StructuredRequest

MANY = 4  # times a checkpoint's bytes: more finished parts than that are of the text
AnyRequest = StructuredRequest | MaskRequest
Outputs = Mapping[float | None, Path]  # ratio (None: what the configuration says) -> directory


def run_identity(ghost: Ghost, request: AnyRequest, work: Work) -> dict:
    """What decides all parts of a run: `work_identity`."""
    return work_identity(ghost, request.config, request.resources.device, work.workers.count)


def checked_prune(
    source: str,
    outputs: Outputs,
    config: Config,
    overwrite: bool = False,
    *,
    plan: Plan | None = None,
    work: Work = NO_WORK,
) -> AnyRequest:
    """A run by any method that can begin, of which no weights were read.

    Args:
        source: checkpoint directory or Hub id.
        outputs: directories to write; for masks or a plan, one.
        overwrite: replace earlier ones.
        plan: what a structured run applies.
        work: where parts and levels are kept, and the processes that share the run.
    Raises:
        UserError: all that can be refused by now.
    """
    ghost = read_ghost(source, config.model)
    if config.method != "structured":
        masks = within_memory(_checked_mask(ghost, outputs, config, overwrite), ghost.model, ghost.stored)
        _check_work(work, ghost, masks, outputs)
        check_rooms([*_outputs(ghost, [masks], outputs), *_kept(ghost, [masks], work), _temporary(ghost, masks)])
        return masks
    request = resolve_structured(config, ghost.model)
    if plan is not None:
        check_given_plan(request, ghost.model, plan, ghost.values)
    requests = [at_ratio(request, ratio) for ratio in outputs] if plan is None else [request]
    largest = min(requests, key=lambda each: each.settings.ratio)  # of what it leaves
    largest = within_memory(largest, ghost.model, ghost.stored)
    if plan is not None:  # room is asked for as if nothing were cut
        requests = [with_ratio(request, 0.0)]
    requests = [replace(each, resources=largest.resources) for each in requests]
    for count, out in enumerate(outputs.values(), start=1):
        check_output(out, ghost.directory, overwrite, count * ghost.stored_bytes)
        if len(outputs) > 1 and (out.parent / "config.json").exists():
            raise UserError(f"'{out.parent}' is a checkpoint, which cannot hold others: give another directory")
    if work.levels is not None:
        check_levels_use(config, work.levels)
        check_levels_directory(work.levels)
        check_levels_place(work.levels, list(outputs.values()))
    _check_text(request.config, ghost)
    _check_work(work, ghost, request, outputs)
    check_rooms([*_outputs(ghost, requests, outputs), *_kept(ghost, requests, work), _temporary(ghost, largest, plan)])
    return replace(request, resources=largest.resources)


def _checked_mask(ghost: Ghost, outputs: Outputs, config: Config, overwrite: bool) -> MaskRequest:
    """`checked_prune` for masks, but for work and memory."""
    request = resolve_masking(config, ghost.model)
    for out in outputs.values():
        check_output(out, ghost.directory, overwrite, ghost.stored_bytes + _mask_bytes(ghost))
    if request.reads_text:
        _check_text(request.config, ghost)
    return request


def _check_text(config: Config, ghost: Ghost) -> None:
    """Refuse windows, a saved calibration or a tokenizer that cannot be used, before weights are read."""
    saved = check_source(config.calibration, ghost.directory)
    check_length(ghost.model, config, saved)
    if saved is not None:
        check_calibration(saved, config)


def check_levels_place(levels: Path, outputs: list[Path]) -> None:
    """Raise UserError for levels and an output that would lie in each other."""
    for out in outputs:
        one, other = levels.resolve(), out.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise UserError(f"--levels {levels} and output '{out}' lie in each other: give them places of their own")


def _check_work(work: Work, ghost: Ghost, request: AnyRequest, outputs: Outputs) -> None:
    """Refuse parts that cannot be kept or gone on from, before weights are read."""
    if work.directory is None:
        return
    others = [Path(request.config.calibration.source), *([] if work.levels is None else [work.levels])]
    places = [*outputs.values(), *(place for place in others if place.exists() or place == work.levels)]
    check_work(work, run_identity(ghost, request, work), places, ghost.directory)


def _outputs(ghost: Ghost, requests: Sequence[AnyRequest], outputs: Outputs) -> list[Room]:
    """Room for outputs."""
    return [Room(out, _output_bytes(ghost, request)) for out, request in zip(outputs.values(), requests)]


def _output_bytes(ghost: Ghost, request: AnyRequest) -> int:
    """Of an output: of a cut model about what a ratio leaves, where one decides."""
    if isinstance(request, MaskRequest):
        return ghost.stored_bytes + _mask_bytes(ghost)
    cuts = request.config.search.budget != "latency"
    gone = request.settings.ratio * sum(size.total for size in request.sizes) if cuts else 0
    return ghost.stored_bytes - int(gone) * ghost.stored.itemsize


def _mask_bytes(ghost: Ghost) -> int:
    return sum(block_weights(ghost.adapter)) // 8


def _kept(ghost: Ghost, requests: Sequence[AnyRequest], work: Work) -> list[Room]:
    """Room for finished parts that are not there yet, and for the levels of a search."""
    size, levels = _parts_bytes(ghost, requests), _levels_bytes(ghost, requests)
    rooms = []
    if work.levels is not None:
        rooms.append(Room(work.levels, levels - kept_bytes(work.levels), "levels in"))
    elif work.directory is None:
        rooms.append(Room(Path(gettempdir()), levels, "levels of the search in"))
    else:
        size += levels
    if work.directory is not None:
        there = kept_bytes(work.directory) if work.resume != "never" else 0
        many = size - levels > MANY * len(requests) * ghost.stored_bytes
        lower = f"calibration.windows = {requests[0].calibration.windows}" if many else ""
        rooms.append(Room(work.directory, size - there, "finished parts in", lower))
    return rooms


def _parts_bytes(ghost: Ghost, requests: Sequence[AnyRequest]) -> int:
    """Bytes of the finished parts of a run at one ratio or more."""
    first, cuts = requests[0], [request for request in requests if isinstance(request, StructuredRequest)]
    if isinstance(first, MaskRequest):
        return mask_work_bytes(ghost.adapter, first, ghost.stored)
    return structured_work_bytes(ghost.adapter, cuts, first.resources.weight_dtype(ghost.stored).itemsize)


def _levels_bytes(ghost: Ghost, requests: Sequence[AnyRequest]) -> int:
    """Bytes of the levels of a search: a library that all ratios share, and of every further round one for each."""
    cuts = [request for request in requests if isinstance(request, StructuredRequest)]
    if not cuts or not cuts[0].config.search.enabled:
        return 0
    itemsize, rounds = cuts[0].resources.weight_dtype(ghost.stored).itemsize, cuts[0].config.search.rounds
    sizes = [search_cost(ghost.adapter, request, itemsize).disk // rounds for request in cuts]
    return max(sizes) + (rounds - 1) * sum(sizes)


def _temporary(ghost: Ghost, request: AnyRequest, plan: Plan | None = None) -> Room:
    """Room for hidden states and weights that go to temporary files."""
    size = predicted_memory(request, ghost.model, ghost.stored, plan)["temporary files"]
    return Room(Path(gettempdir()), size, "temporary files in")
