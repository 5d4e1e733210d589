"""What a run of `structprune prune` refuses before weights are read: settings, text, places, and disks too full."""

from dataclasses import replace
from pathlib import Path

from structprune.calibration.build import check_length, check_source
from structprune.calibration.trajectories import check_calibration
from structprune.checkpoint.output import check_output
from structprune.config import Config
from structprune.errors import UserError
from structprune.masking.request import MaskRequest
from structprune.runs.budget import within_memory
from structprune.runs.depth import check_levels_use
from structprune.runs.ghost import Ghost, read_ghost
from structprune.runs.resolve import at_ratio, check_given_plan, resolve_masking, resolve_structured
from structprune.runs.rooms import AnyRequest, Outputs, check_room
from structprune.runs.search import check_levels_directory
from structprune.runs.work import NO_WORK, Work, check_work, work_identity
from structprune.structured.plan import Plan


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
    room: bool = True,
) -> AnyRequest:
    """A run by any method that can begin, of which no weights were read.

    Args:
        source: checkpoint directory or Hub id.
        outputs: directories to write; for masks or a plan, one.
        overwrite: replace earlier ones.
        plan: what a structured run applies.
        work: where parts and levels are kept, and the processes that share the run.
        room: ask for room on disks too.
    Raises:
        UserError: all that can be refused by now.
    """
    ghost = read_ghost(source, config.model)
    if config.method != "structured":
        masks = within_memory(_checked_mask(ghost, outputs, config, overwrite), ghost.model, ghost.stored)
        _check_parts(work, ghost, masks, outputs)
        if room:
            check_room(ghost, masks, outputs, work)
        return masks
    request = resolve_structured(config, ghost.model)
    if plan is not None:
        check_given_plan(request, ghost.model, plan, ghost.values)
    requests = [at_ratio(request, ratio) for ratio in outputs] if plan is None else [request]
    largest = min(requests, key=lambda each: each.settings.ratio)  # of what it leaves
    resources = within_memory(largest, ghost.model, ghost.stored, plan).resources
    request = replace(request, resources=resources)
    for out in outputs.values():
        check_output(out, ghost.directory, overwrite)
        if len(outputs) > 1 and (out.parent / "config.json").exists():
            raise UserError(f"'{out.parent}' is a checkpoint, which cannot hold others: give another directory")
    if work.levels is not None:
        check_levels_use(config, work.levels)
        check_levels_directory(work.levels)
        check_levels_place(work.levels, list(outputs.values()))
    _check_text(request.config, ghost)
    _check_parts(work, ghost, request, outputs)
    if room:
        check_room(ghost, request, outputs, work, plan)
    return request


def _checked_mask(ghost: Ghost, outputs: Outputs, config: Config, overwrite: bool) -> MaskRequest:
    """`checked_prune` for masks, but for work and memory."""
    request = resolve_masking(config, ghost.model)
    for out in outputs.values():
        check_output(out, ghost.directory, overwrite)
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


def _check_parts(work: Work, ghost: Ghost, request: AnyRequest, outputs: Outputs) -> None:
    """Refuse parts that cannot be kept or gone on from, before weights are read."""
    if work.directory is None:
        return
    others = [Path(request.config.calibration.source), *([] if work.levels is None else [work.levels])]
    places = [*outputs.values(), *(place for place in others if place.exists() or place == work.levels)]
    check_work(work, run_identity(ghost, request, work), places, ghost.directory)
