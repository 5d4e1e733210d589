"""Prune and train back, at one ratio or on from each to the next: `structprune prune --recover`, without a console."""

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from structprune.checkpoint.output import Room, check_apart, check_place, check_rooms
from structprune.errors import UserError
from structprune.files import remove_folders
from structprune.models.checkpoint_files import read_json
from structprune.models.fingerprint import fingerprint
from structprune.models.placement import give_back_memory
from structprune.recovery.cache import begun
from structprune.recovery.folder import check_folder, training_folder
from structprune.recovery.sharded import check_sharded, is_sharded
from structprune.recovery.trainer import require_training
from structprune.runs.checkpoints import mask_checkpoint, prune_at_ratios, prune_checkpoint
from structprune.runs.checks import check_levels_place, checked_prune
from structprune.runs.evaluate import ALONE, Session
from structprune.runs.ghost import read_ghost
from structprune.runs.inspect import inspect_checkpoint, inspect_masking, left_by
from structprune.runs.recover import check_places, check_request, checked, train_back, with_length
from structprune.runs.resolve import at_ratio, resolve_structured
from structprune.runs.rooms import check_room
from structprune.runs.schedule import Schedule, relative_ratio
from structprune.runs.stages import (
    REQUEST,
    check_pruned,
    clear_finished,
    close_pruned,
    digest,
    finished_report,
    is_pruned,
    left_behind,
    open_pruned,
    pruned_folder,
    pruned_model,
    text_digest,
)
from structprune.runs.training import Recovery
from structprune.runs.work import Resume, Work, clear, has_parts, work_beside

INDIFFERENT: Any = {"model": {"device", "allow_pickle"}, "memory": True, "calibration": {"source"}}  # decide no weights


@dataclass(frozen=True)
class Step:
    """A recovered model that a schedule wrote.

    Attributes:
        directory: of the checkpoint. report: the content of its report.json, of the pruning and, under `recoveries`,
            of the training.
        source_bytes: of the weights of what was pruned, in their stored dtype.
        earlier: whether an earlier run wrote it.
    """

    directory: Path
    report: dict
    source_bytes: int
    earlier: bool


def prune_and_recover(
    source: str, out: str | Path, schedule: Schedule, overwrite: bool = False, session: Session = ALONE
) -> list[Step]:
    """Prune a dense model at every ratio of a schedule, and train each result back against it.

    What is pruned lies beside the output, in `OUT.pruned`, and checkpoints of the training in `OUT.training`, until
    the output is written; the same call goes on from them, and leaves finished outputs as they are.

    Args:
        source: checkpoint directory or Hub id of the dense model, which is also the teacher.
        out: directory to write; of several ratios, each has a directory in it, `out/ratio-0.3`. Each appears complete
            or not at all.
        overwrite: replace earlier outputs, and begin anew.
        session: progress, and the processes that share prunings and trainings; the first one writes.
    Returns:
        What was written, by rising ratio.
    Raises:
        UserError: anything the user can mend, before weights are read where it can be known then.
    """
    run = ScheduleRun(source, Path(out), schedule, overwrite, session)
    return sorted(run.steps(), key=lambda step: run.places.index(step.directory))


class ScheduleRun:
    """A schedule that can be run or planned with; arguments and errors as `prune_and_recover`."""

    def __init__(self, source: str, out: Path, schedule: Schedule, overwrite: bool = False, session: Session = ALONE):
        self._source, self._overwrite, self._session = source, overwrite, session
        schedule = schedule.completed()
        require_training()
        self._outputs = schedule.outputs(out)
        self._dense = read_ghost(source, schedule.config.model)
        self._schedule = schedule = replace(schedule, recovery=with_length(schedule.recovery, [self._dense]))
        ghosts = (self._dense, self._dense)  # no training changes shapes of its text or settings
        settings, self._cache = check_request(ghosts, schedule.recovery, session)
        if is_sharded():  # what is masked has zeros that the dense model, in the student's place here, has not
            train, windows = schedule.recovery.train, schedule.recovery.data.held_out
            check_sharded(train.method, schedule.config.method != "structured", session.workers.count, windows)
        recovery = Recovery(ghosts, settings, self._cache, session)
        count = schedule.parts
        self._trainings = {
            ratio: recovery.part(index % count, count) for index, ratio in enumerate(self._outputs)
        }  # with the dense model in the student's place
        self._text = text_digest(schedule.config.calibration.source)
        self._reports: dict[float | None, dict] = session.workers.gather(self._finished())[0]
        self._pending = [ratio for ratio in self._outputs if ratio not in self._reports]
        session.workers.first(self._check)

    def _finished(self) -> dict[float | None, dict]:
        """Reports of the outputs that this request has written."""
        self._reports = {}
        for ratio, out in self._outputs.items() if not self._overwrite else ():
            report = finished_report(out, self._request(ratio))
            if report is not None:
                self._reports[ratio] = report
            elif self._schedule.gradual:
                break  # what comes next is made of this
        return self._reports

    def _origin(self, ratio: float | None) -> tuple[str, float | None]:
        """The checkpoint that is pruned for a ratio, and the ratio as a share of that one."""
        earlier = [
            each for each in self._outputs if self._schedule.gradual and each is not None and each < (ratio or 0)
        ]
        if ratio is None or not earlier:
            return self._source, ratio
        left = math.prod(1 - self._reports[each]["ratio"] for each in earlier)
        return str(self._outputs[earlier[-1]]), relative_ratio(ratio, 1 - left)

    def _identity(self, ratio: float | None) -> dict:
        """What the pruned model of a ratio is made of, as plain data without paths."""
        schedule, (source, own) = self._schedule, self._origin(ratio)
        config = schedule.at(own)
        allow = config.model.allow_pickle
        content = self._dense.identity(allow) if source == self._source else fingerprint(Path(source), allow)
        shared = config.search.enabled and not schedule.gradual  # first levels are made around the plans of all
        return {
            "source": content,
            "text": self._text,
            "config": config.model_dump(mode="json", exclude=INDIFFERENT),
            "plan": None if schedule.plan is None else digest(schedule.plan.to_json()),
            "ratios": sorted(schedule.ratios) if shared else [],
        }

    def _request(self, ratio: float | None) -> str:
        """A digest of all that decides the output of a ratio."""
        return digest(self._identity(ratio), self._trainings[ratio].identity)

    def _check(self) -> None:
        """Raise UserError for what cannot be pruned or written."""
        schedule, pending = self._schedule, {ratio: self._outputs[ratio] for ratio in self._pending}
        if not pending:
            return
        first, dense = next(iter(pending)), self._dense
        begins = self._origin(first)[0] == self._source  # of a later ratio, parts are of the recovered model before it
        work = self._work([first]) if begins else Work(levels=schedule.levels)
        request = checked_prune(
            self._source, pending, schedule.at(first), self._overwrite, plan=schedule.plan, work=work, room=False
        )
        asked = {first: pending[first]} if schedule.gradual else pending  # each of a gradual one clears its own parts
        asked = {ratio: out for ratio, out in asked.items() if not is_pruned(out)}
        if begins and asked:
            check_room(dense, request, asked, work, schedule.plan)
        if schedule.gradual:
            self._check_ratios()
        for ratio, out in pending.items():
            check_places(out, (dense, dense), self._overwrite, self._cache)
            check_apart(pruned_folder(out), dense.directory, overwrite=True)
            check_place(pruned_folder(out))
            if schedule.levels is not None:
                check_levels_place(schedule.levels, [pruned_folder(out), training_folder(out)])
            if self._cache is not None and pruned_folder(out) in (self._cache, *self._cache.parents):
                raise UserError(f"teacher.cache = {self._cache} lies in '{pruned_folder(out)}': give it another place")
            known = not schedule.gradual or ratio == first
            check_pruned(out, self._identity(ratio) if known else None, self._overwrite)
            check_folder(out, self._trainings[ratio].identity, self._overwrite, aside=("student",))
        output = Room(pending[first], (len(pending) + 1) * dense.stored_bytes)  # and what is pruned, for a while
        small = None if schedule.plan else left_by(schedule.at(first), dense.model)
        check_rooms([output, *self._trainings[first].rooms(pending[first], small)])

    def _check_ratios(self) -> None:
        """Raise UserError where a share of what an earlier ratio leaves cannot go, on the dense model's shapes."""
        request, ratios = resolve_structured(self._schedule.config, self._dense.model), sorted(self._schedule.ratios)
        for before, ratio in zip(ratios, ratios[1:]):
            at_ratio(request, relative_ratio(ratio, before), cut_before=True)

    def plan(self) -> list[tuple[Path, dict, dict]]:
        """For every output what inspection says of the pruning and `Recovery.plan` of the training.

        Raises:
            UserError: a plan decides what goes.
        """
        schedule, plans = self._schedule, []
        if schedule.plan is not None:
            raise UserError("a dry run counts what a ratio removes, not what a plan does: leave out one of them")
        for ratio, out in self._outputs.items():
            config = schedule.at(ratio)
            inspect = inspect_checkpoint if config.method == "structured" else inspect_masking
            plans.append(
                (out, inspect(self._source, config), self._trainings[ratio].plan(left_by(config, self._dense.model)))
            )
        return plans

    @property
    def places(self) -> list[Path]:
        """Directories of the outputs, by rising ratio."""
        return list(self._outputs.values())

    def kept(self) -> list[Path]:
        """What there is of a run that was ended, for the next one: outputs, pruned models, folders of checkpoints."""
        folders = [folder for ratio in self._pending for folder in left_behind(self._outputs[ratio])]
        parts = [work_beside(self._outputs[ratio]) for ratio in self._pending]
        folders += [folder for folder in parts if has_parts(folder)] + begun(self._cache)
        return [self._outputs[ratio] for ratio in self._reports] + folders

    def steps(self) -> Iterator[Step]:
        """Prune and train what is not finished, after what is."""
        workers, outputs = self._session.workers, self._outputs
        for ratio in self._reports:
            workers.first(partial(clear_finished, outputs[ratio], self._identity(ratio)))
        yield from map(self._step, list(self._reports))
        waves = [[ratio] for ratio in self._pending] if self._schedule.gradual else [self._pending]
        for wave in waves:
            requests = {ratio: self._request(ratio) for ratio in wave}
            self._prune(wave)
            give_back_memory()
            for ratio in wave:
                self._train(ratio, requests[ratio])
                yield self._step(ratio)

    def _step(self, ratio: float | None) -> Step:
        origin = read_ghost(self._origin(ratio)[0], self._schedule.config.model)
        return Step(self._outputs[ratio], self._reports[ratio], origin.stored_bytes, ratio not in self._pending)

    def _prune(self, ratios: Sequence[float | None]) -> None:
        """Prune, from one checkpoint, what an earlier run has not left pruned."""
        workers = self._session.workers
        missing, made = workers.from_first(lambda: self._opened(ratios))
        try:
            places = {self._origin(ratio)[1]: pruned_model(self._outputs[ratio]) for ratio in missing}
            if missing:
                self._prune_to(self._origin(missing[0])[0], places, self._work(ratios))
            if ratios:
                workers.first(lambda: clear(work_beside(self._outputs[ratios[0]])))
        finally:
            for ratio in missing if workers.main else ():
                if not is_pruned(self._outputs[ratio]):
                    close_pruned(self._outputs[ratio])
            if workers.main:
                remove_folders(made)  # as far as they are empty

    def _opened(self, ratios: Sequence[float | None]) -> tuple[list[float | None], list[Path]]:
        """The ratios that are not pruned yet, and the folders that were made for them."""
        identities = {ratio: self._identity(ratio) for ratio in ratios}
        for ratio in ratios:
            check_pruned(self._outputs[ratio], identities[ratio], self._overwrite)
        missing = [ratio for ratio in ratios if self._overwrite or not is_pruned(self._outputs[ratio])]
        if missing and self._schedule.config.search.enabled:
            missing = list(ratios)  # which share the first levels
        return missing, [folder for each in missing for folder in open_pruned(self._outputs[each], identities[each])]

    def _prune_to(self, source: str, places: dict[float | None, Path], work: Work) -> None:
        """Prune or mask a checkpoint, and save."""
        schedule, track = self._schedule, self._session.track
        ratio, place = next(iter(places.items()))
        config = schedule.at(ratio)
        if config.method != "structured":
            mask_checkpoint(source, place, config, track=track, work=work)
        elif schedule.plan is not None:
            prune_checkpoint(source, place, config, schedule.plan, track=track, work=work)
        else:
            for written in prune_at_ratios(source, places, config, track=track, work=work):
                del written  # its model

    def _work(self, ratios: Sequence[float | None]) -> Work:
        """Where the parts of a pruning lie until it is done: beside the first of its outputs."""
        out = self._outputs[ratios[0]]
        resume: Resume = "never" if self._overwrite else "auto"
        place, workers = work_beside(out), self._session.workers
        watch = self._session.watch
        return Work(place, self._schedule.levels, resume, watch=watch, restart="--overwrite", workers=workers)

    def _train(self, ratio: float | None, request: str) -> None:
        """Train a pruned model back, write it, and remove what it was made of."""
        out, session, schedule = self._outputs[ratio], self._session, self._schedule
        student, number = str(pruned_model(out)), list(self._outputs).index(ratio) % schedule.parts
        recovery = checked(student, self._source, out, schedule.recovery, self._overwrite, session)
        part = recovery.part(number, schedule.parts)
        train_back(part, out, self._overwrite, session, {REQUEST: request})
        del recovery, part
        gc.collect()  # a trainer and its models refer to each other, and would be there beside the next ones
        give_back_memory()
        session.workers.first(lambda: close_pruned(out))
        self._reports[ratio] = read_json(out / "report.json")
