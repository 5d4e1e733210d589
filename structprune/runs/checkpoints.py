"""From a checkpoint directory or Hub id to an output directory: `structprune prune`, without a console."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from structprune.checkpoint.output import save_finished
from structprune.config import Config
from structprune.errors import UserError
from structprune.masking.request import MaskRequest
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track, untracked
from structprune.runs.checks import checked_prune, run_identity
from structprune.runs.ghost import read_ghost
from structprune.runs.load import load_dense
from structprune.runs.mask import Masked, MaskRun
from structprune.runs.pruned import Pruned
from structprune.runs.pruner import Pruner
from structprune.runs.rehearsal import rehearse
from structprune.runs.resolve import resolve_structured
from structprune.runs.rooms import AnyRequest, Outputs, check_room
from structprune.runs.work import (
    NO_WORK,
    WRITTEN,
    Work,
    check_work,
    is_written,
    output_notes,
    output_part,
    working,
)
from structprune.structured.plan import Plan
from structprune.structured.request import StructuredRequest
from structprune.workers import Workers


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
        model, source_bytes = _loaded(source, request, {None: out}, work, plan)
        pruner = Pruner(model, request, track=track, workers=work.workers)
        rehearse(pruner, request, journal)
        pruner.keep_in(journal)
        pruned = pruner.prune(plan=plan)
        work.workers.first(lambda: save_finished(pruned.save, out, overwrite))
    return Written(pruned, out, source_bytes)


def _together(workers: Workers, check: Callable[[], AnyRequest]) -> AnyRequest:
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


def _journal(source: str, request: AnyRequest, work: Work):
    """Of a run that was checked: `working`."""
    config = request.config
    return working(work, lambda: run_identity(read_ghost(source, config.model), request, work))


def _loaded(
    source: str, request: AnyRequest, outputs: Outputs, work: Work, plan: Plan | None = None
) -> tuple[DiffusionLM, int]:
    """The dense model and the bytes of its weights as stored; arguments as `check_room`.

    Raises:
        UserError: its download has left a disk too little room.
    """
    loaded = load_dense(source, request, work.workers)
    ghost = partial(read_ghost, source, request.config.model)
    work.workers.first(lambda: check_room(ghost(), request, outputs, work, plan))
    return loaded


def prune_at_ratios(
    source: str,
    outputs: Outputs,
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
    if outputs and not left:  # a kill came between the last output and the end
        _end(source, config, work)
        return
    request = _together(workers, partial(checked_prune, source, left, config, overwrite, work=work))
    assert isinstance(request, StructuredRequest)
    with _journal(source, request, work) as journal:
        model, source_bytes = _loaded(source, request, left, work)
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


def _end(source: str, config: Config, work: Work) -> None:
    """The end of a run whose outputs an earlier one has all written.

    Raises:
        UserError: they are another run's.
    """

    def check() -> StructuredRequest:
        ghost = read_ghost(source, config.model)
        request = resolve_structured(config, ghost.model)
        check_work(work, run_identity(ghost, request, work), [], ghost.directory)
        return request

    with _journal(source, _together(work.workers, check), work):
        pass


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
        model, source_bytes = _loaded(source, request, {None: out}, work)
        run = MaskRun(model, request, None, track, work.workers)
        rehearse(run, request, journal)
        run.keep_in(journal)
        masked = run.run(in_place=True)
        work.workers.first(lambda: save_finished(masked.save, out, overwrite))
    return Written(masked, out, source_bytes)
