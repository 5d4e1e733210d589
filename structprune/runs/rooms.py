"""What a run of `structprune prune` puts on disks, and whether they have room for all of it together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import gettempdir

from structprune.bench.work_size import mask_work_bytes, structured_work_bytes, weight_bytes
from structprune.checkpoint.output import Room, check_rooms
from structprune.errors import UserError
from structprune.levels.cost import search_cost
from structprune.masking.request import MaskRequest
from structprune.runs.budget import predicted_memory
from structprune.runs.ghost import Ghost
from structprune.runs.resolve import at_ratio, block_weights, with_ratio
from structprune.runs.work import Work, kept_bytes
from structprune.structured.plan import Plan
from structprune.structured.request import StructuredRequest
from structprune.workers import processes_here

MANY = 4  # times a checkpoint's bytes: more finished parts than that are of the text
AnyRequest = StructuredRequest | MaskRequest
Outputs = Mapping[float | None, Path]  # ratio (None: what the configuration says) -> directory


def check_room(ghost: Ghost, request: AnyRequest, outputs: Outputs, work: Work, plan: Plan | None = None) -> None:
    """Check that disks have room for outputs, finished parts, levels of a search and temporary files together.

    Args:
        outputs: that are still to be written; for masks or a plan, one.
        plan: what a structured run applies; room is asked for as if it cut nothing.
    Raises:
        UserError: one has less.
    """
    requests: Sequence[AnyRequest] = [request]
    if isinstance(request, StructuredRequest):
        whole = plan is not None
        requests = [with_ratio(request, 0.0)] if whole else [at_ratio(request, ratio) for ratio in outputs]
    rooms = [Room(out, _output_bytes(ghost, each)) for out, each in zip(outputs.values(), requests)]
    check_rooms([*rooms, *_part_rooms(ghost, requests, work), *_temporary_rooms(ghost, requests, work, plan)])


def _output_bytes(ghost: Ghost, request: AnyRequest) -> int:
    """Of an output: of a cut model about what a ratio leaves, where one decides."""
    if isinstance(request, MaskRequest):
        return ghost.stored_bytes + sum(block_weights(ghost.adapter)) // 8
    cuts = request.config.search.budget != "latency"
    gone = request.settings.ratio * sum(size.total for size in request.sizes) if cuts else 0
    return ghost.stored_bytes - int(gone) * ghost.stored.itemsize


def _part_rooms(ghost: Ghost, requests: Sequence[AnyRequest], work: Work) -> list[Room]:
    """Room for finished parts that are not there yet, and for the levels of a search."""
    size, levels = _parts_bytes(ghost, requests), _levels_bytes(ghost, requests)
    rooms = []
    if work.levels is not None:
        rooms.append(Room(work.levels, levels - kept_bytes(work.levels), "levels in"))
    elif work.directory is None:
        rooms += _in_temporary(levels, "levels of the search in")
    else:
        size += levels
    if work.directory is not None:  # a run that begins anew removes what is there
        text = requests[0].calibration
        many = size - levels > MANY * len(requests) * ghost.stored_bytes and not text.replays
        remedy = f"lower calibration.windows = {text.windows}" if many else ""
        rooms.append(Room(work.directory, size - kept_bytes(work.directory), "finished parts in", remedy))
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


def _temporary_rooms(ghost: Ghost, requests: Sequence[AnyRequest], work: Work, plan: Plan | None) -> list[Room]:
    """Room for hidden states, and for changed weights of a run from disk: of one process they lie in finished parts
    where these are kept; each of several has its own."""
    request = requests[0]
    size = max(predicted_memory(each, ghost.model, ghost.stored, plan)["temporary files"] for each in requests)
    if request.resources.on_disk:
        weights = min(size, max(weight_bytes(ghost.adapter, each, ghost.stored) for each in requests))
        size += weights * (processes_here() - 1) if work.workers.several else -weights * (work.directory is not None)
    return _in_temporary(size, "temporary files in")


def _in_temporary(size: int, what: str) -> list[Room]:
    """Room where temporary files go, if any do.

    Raises:
        UserError: there is no such place.
    """
    if size <= 0:
        return []
    try:
        return [Room(Path(gettempdir()), size, what, "set TMPDIR to another disk")]
    except OSError as error:
        raise UserError("temporary files cannot be written anywhere: set TMPDIR to a directory that can be") from error
