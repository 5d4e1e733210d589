"""From a checkpoint directory or Hub id to an output directory: `structprune prune`, without a console."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from structprune.bench.work_size import mask_work_bytes, structured_work_bytes
from structprune.calibration.build import check_length, check_source
from structprune.calibration.trajectories import check_calibration
from structprune.checkpoint.output import check_output, check_space, save_finished
from structprune.config import Config
from structprune.errors import UserError
from structprune.masking.request import MaskRequest
from structprune.models.adapter import Adapter
from structprune.progress import Track, untracked
from structprune.runs.budget import within_memory
from structprune.runs.depth import check_levels_use
from structprune.runs.ghost import Ghost, read_ghost
from structprune.runs.load import load_dense
from structprune.runs.mask import Masked, MaskRun
from structprune.runs.pruned import Pruned
from structprune.runs.pruner import Pruner
from structprune.runs.rehearsal import rehearse
from structprune.runs.resolve import at_ratio, block_weights, check_given_plan, resolve_masking, resolve_structured
from structprune.runs.search import check_levels_directory
from structprune.runs.work import (
    NO_WORK,
    WRITTEN,
    Work,
    check_work,
    clear,
    is_written,
    kept_bytes,
    output_notes,
    output_part,
    work_identity,
    working,
)
from structprune.structured.plan import Plan
from structprune.structured.request import StructuredRequest
from structprune.workers import Workers

MANY = 4  # times a checkpoint's bytes: more finished parts than that are of the text


@dataclass(frozen=True)
class Written:
    """An output directory: what was saved there, and the bytes of the source's weights in their stored dtype."""

    result: Pruned | Masked
    directory: Path
    source_bytes: int


def prune_checkpoint(
    source: str,
    out: Path,
    config: Config,
    plan: Plan | None = None,
    overwrite: bool = False,
    track: Track = untracked,
    *,
    work: Work = NO_WORK,
) -> Written:
    """Load, prune and save. Everything that can be refused is, before weights are read.

    Args:
        source: checkpoint directory or Hub id.
        out: directory to write; it appears complete or not at all.
        plan: apply this one instead of scoring.
        overwrite: replace an earlier output.
        work: keep finished parts and levels, and go on from those of a run that was killed; and the processes that
            share the run, of which the first one writes.
    Raises:
        UserError: anything the user can mend; or `out` was taken during the run, which is kept beside it then.
    """
    if plan is not None and work.levels is not None:
        raise UserError(f"levels in '{work.levels}' are for a search, and a plan says what goes already: leave one out")
    if plan is None:
        [written] = prune_at_ratios(source, {None: out}, config, overwrite, track, work=work)
        return written
    request = _together(
        work.workers, partial(checked_prune, source, {None: out}, config, overwrite, plan=plan, work=work)
    )
    assert isinstance(request, StructuredRequest)
    with _journal(source, request, work) as journal:
        model, source_bytes = load_dense(source, request, work.workers)
        work.workers.first(lambda: check_space(out, source_bytes))  # again: a download may have filled the disk
        pruner = Pruner(model, request, track=track, workers=work.workers)
        rehearse(pruner, request, journal)
        pruner.keep_in(journal)
        pruned = pruner.prune(plan=plan)
        work.workers.first(lambda: save_finished(pruned.save, out, overwrite))
    return Written(pruned, out, source_bytes)


def _together(
    workers: Workers, check: Callable[[], StructuredRequest | MaskRequest]
) -> StructuredRequest | MaskRequest:
    """A checked run in every process, each on an accelerator of its own.

    Raises:
        UserError: as `check`, or one accelerator was named for all.
    """
    request = workers.in_turn(check)
    named = request.config.model.device
    if workers.several and str(named).startswith("cuda:"):
        raise UserError(f"{workers.count} processes cannot share device '{named}': leave it out, or give cuda")
    if workers.device is None or named not in (None, "cuda"):
        return request
    return replace(request, resources=replace(request.resources, device=torch.device(workers.device)))


def _journal(source: str, request: StructuredRequest | MaskRequest, work: Work):
    """Of a run that was checked: `working`."""
    config = request.config
    return working(work, lambda: _identity(read_ghost(source, config.model), request, work))


def _identity(ghost: Ghost, request: StructuredRequest | MaskRequest, work: Work) -> dict:
    """What decides all parts of a run: `work_identity`."""
    return work_identity(ghost, request.config, request.resources.device, work.workers.count)


def prune_at_ratios(
    source: str,
    outputs: Mapping[float | None, Path],
    config: Config,
    overwrite: bool = False,
    track: Track = untracked,
    *,
    work: Work = NO_WORK,
) -> Iterator[Written]:
    """Load once, and prune and save at one ratio after another, in rising order; arguments as `prune_checkpoint`.

    Args:
        outputs: ratio (None: what the configuration says) -> directory to write; each appears complete or not at all.
            Those that an earlier run of the same work wrote are left as they are.
    Raises:
        UserError: anything the user can mend at any of the ratios, before weights are read.
    """
    outputs = dict(sorted(outputs.items(), key=lambda each: each[0] or 0))
    several = len(outputs) > 1
    workers = work.workers
    written = workers.from_first(
        lambda: [ratio for ratio, out in outputs.items() if several and is_written(work, ratio, out, config)]
    )
    left = {ratio: out for ratio, out in outputs.items() if ratio not in written}
    if not left and (directory := work.directory) is not None:  # a kill came between the last output and the end
        workers.first(lambda: clear(directory))
        return
    request = _together(workers, partial(checked_prune, source, left, config, overwrite, work=work))
    assert isinstance(request, StructuredRequest)
    with _journal(source, request, work) as journal:
        model, source_bytes = load_dense(source, request, workers)
        for out in left.values():  # again: a download may have filled the disk
            workers.first(partial(check_space, out, len(left) * source_bytes))
        pruner = Pruner(model, request, track=track, levels=work.levels, workers=workers)
        rehearse(pruner, request, journal)
        pruner.keep_in(journal)
        places = iter(left.items())
        for pruned in pruner.prune_each(list(outputs), written=written):
            ratio, out = next(places)
            workers.first(partial(save_finished, pruned.save, out, overwrite))
            if several:
                journal.mark(WRITTEN, output_part(ratio, config), workers.from_first(partial(output_notes, out)))
            yield Written(pruned, out, source_bytes)
            del pruned  # two pruned models at once would be the peak of memory


def checked_prune(
    source: str,
    outputs: Mapping[float | None, Path],
    config: Config,
    overwrite: bool = False,
    *,
    plan: Plan | None = None,
    work: Work = NO_WORK,
) -> StructuredRequest | MaskRequest:
    """A run by any method that can begin, of which no weights were read; arguments as `prune_at_ratios`.

    Args:
        outputs: for masks or a plan, one.
        plan: what a structured run applies.
    Raises:
        UserError: all that can be refused by now.
    """
    ghost = read_ghost(source, config.model)
    if config.method != "structured":
        masks = within_memory(_checked_mask(ghost, outputs, config, overwrite), ghost.model, ghost.stored)
        _check_work(work, ghost, masks, outputs)
        return masks
    request = resolve_structured(config, ghost.model)
    if plan is not None:
        check_given_plan(request, ghost.model, plan, ghost.values)
    least = at_ratio(request, min(outputs, key=lambda ratio: ratio or 0)) if plan is None else request  # the largest
    request = replace(request, resources=within_memory(least, ghost.model, ghost.stored).resources)
    for count, (ratio, out) in enumerate(outputs.items(), start=1):
        if plan is None:
            at_ratio(request, ratio)
        check_output(out, ghost.directory, overwrite, count * ghost.stored_bytes)
        if len(outputs) > 1 and (out.parent / "config.json").exists():
            raise UserError(f"'{out.parent}' is a checkpoint, which cannot hold others: give another directory")
    if work.levels is not None:
        check_levels_use(config, work.levels)
        check_levels_directory(work.levels)
        check_levels_place(work.levels, list(outputs.values()))
    _check_text(request.config, ghost)
    _check_work(work, ghost, request, outputs)
    return request


def _check_work(
    work: Work,
    ghost: Ghost,
    request: StructuredRequest | MaskRequest,
    outputs: Mapping[float | None, Path],
) -> None:
    """Refuse parts that cannot be kept or gone on from, before weights are read."""
    if work.directory is None:
        return
    others = [Path(request.config.calibration.source), *([] if work.levels is None else [work.levels])]
    places = [*outputs.values(), *(place for place in others if place.exists() or place == work.levels)]
    check_work(work, _identity(ghost, request, work), places, ghost.directory)
    itemsize = request.resources.weight_dtype(ghost.stored).itemsize
    if isinstance(request, MaskRequest):
        size = mask_work_bytes(ghost.adapter, request, itemsize)
    else:
        each = [request if ratio is None else at_ratio(request, ratio) for ratio in outputs]
        size = structured_work_bytes(ghost.adapter, each, itemsize)
    there = kept_bytes(work.directory) if work.resume != "never" else 0
    many = size > MANY * len(outputs) * ghost.stored_bytes
    lower = f"calibration.windows = {request.calibration.windows}" if many else ""
    check_space(work.directory, max(0, size - there), "finished parts in", lower)


def _checked_mask(ghost: Ghost, outputs: Mapping[float | None, Path], config: Config, overwrite: bool) -> MaskRequest:
    """`checked_prune` for masks."""
    request = resolve_masking(config, ghost.model)
    mask_bytes = sum(block_weights(ghost.adapter)) // 8
    for out in outputs.values():
        check_output(out, ghost.directory, overwrite, ghost.stored_bytes + mask_bytes)
    if request.reads_text:
        _check_text(request.config, ghost)
    return request


def mask_checkpoint(
    source: str,
    out: Path,
    config: Config,
    overwrite: bool = False,
    track: Track = untracked,
    *,
    work: Work = NO_WORK,
) -> Written:
    """Load, mask and save in the source's layout; arguments as `prune_checkpoint`.

    Raises:
        UserError: anything the user can mend, before weights are read where it can be known then.
    """
    request = _together(work.workers, partial(checked_prune, source, {None: out}, config, overwrite, work=work))
    assert isinstance(request, MaskRequest)
    with _journal(source, request, work) as journal:
        model, source_bytes = load_dense(source, request, work.workers)
        mask_bytes = sum(block_weights(Adapter(model))) // 8
        work.workers.first(lambda: check_space(out, source_bytes + mask_bytes))
        run = MaskRun(model, request, None, track, work.workers)
        rehearse(run, request, journal)
        run.keep_in(journal)
        masked = run.run(in_place=True)
        work.workers.first(lambda: save_finished(masked.save, out, overwrite))
    return Written(masked, out, source_bytes)


def check_levels_place(levels: Path, outputs: list[Path]) -> None:
    """Raise UserError for levels and an output that would lie in each other."""
    for out in outputs:
        one, other = levels.resolve(), out.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise UserError(f"--levels {levels} and output '{out}' lie in each other: give them places of their own")


def _check_text(config: Config, ghost: Ghost) -> None:
    """Refuse windows, a saved calibration or a tokenizer that cannot be used, before weights are read."""
    saved = check_source(config.calibration, ghost.directory)
    check_length(ghost.model, config, saved)
    if saved is not None:
        check_calibration(saved, config)
