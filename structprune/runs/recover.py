"""Train a pruned checkpoint back against the dense one: `structprune recover`, without a console."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from structprune.checkpoint.output import check_apart, check_output, save_finished
from structprune.errors import UserError
from structprune.evaluation.workers import Workers
from structprune.progress import Track, untracked
from structprune.recovery.folder import open_folder, training_folder
from structprune.recovery.held_out import ALONE
from structprune.recovery.settings import RecoverConfig, TeacherSettings
from structprune.recovery.trainer import passes_of, require_training
from structprune.runs.ghost import Ghost, read_ghost
from structprune.runs.training import Recovery


@dataclass(frozen=True)
class Recovered:
    """What a recovery wrote.

    Attributes:
        directory: of the checkpoint. report: its lineage, as plain data.
    """

    directory: Path
    report: dict


def recover(
    pruned: str,
    teacher: str,
    out: Path,
    config: RecoverConfig,
    overwrite: bool = False,
    track: Track = untracked,
    *,
    teacher_cache: Path | None = None,
    place: Workers = ALONE,
) -> Recovered:
    """Train the model in `pruned` towards the predictions of `teacher`, and write it in its own layout.

    Checkpoints of the training lie beside the output, in `OUT.training`, until it is done; the same call goes on from
    the last one. What the held-out text shows to be no better is not written: the input is, and the report says so.

    Args:
        pruned, teacher: checkpoint directories or Hub ids.
        out: directory to write; it appears complete or not at all.
        overwrite: replace an earlier output, and forget an earlier training.
        teacher_cache: directory for the teacher's predictions, which are written once and stay there.
        place: the processes that share the training; the first one writes.
    Raises:
        UserError: anything the user can mend, before weights are read where it can be known then.
    """
    require_training()
    recovery = checked(pruned, teacher, out, config, overwrite, track, teacher_cache=teacher_cache, place=place)
    folder = training_folder(out)
    with first_alone(place):
        if place.main:
            open_folder(out, recovery.identity, overwrite)
    report = recovery.run(folder)
    with first_alone(place):
        if place.main:
            save_finished(lambda path, replace: recovery.save(path, report, replace), out, overwrite)
            shutil.rmtree(folder)
    return Recovered(out, report)


def checked(
    pruned: str,
    teacher: str,
    out: Path,
    config: RecoverConfig,
    overwrite: bool = False,
    track: Track = untracked,
    *,
    teacher_cache: Path | None = None,
    place: Workers = ALONE,
) -> Recovery:
    """A recovery that can be run, or planned with; no weights are read. Arguments and errors as `recover`."""
    ghosts = read_ghost(pruned, config.model), read_ghost(teacher, config.model)
    check_pair(*ghosts)
    for ghost in ghosts:
        check_window(ghost, config.data.length)
    passes_of(config.train, place.count)
    check_teacher(config, teacher_cache)
    with first_alone(place):
        if place.main:
            check_output(out, ghosts[0].directory, overwrite, ghosts[0].stored_bytes)
            check_apart(out, ghosts[1].directory, overwrite)
    return Recovery(ghosts, config, track, teacher_cache, place)


@contextmanager
def first_alone(place: Workers) -> Iterator[None]:
    """What the first process does while the others wait; its problem is everyone's.

    Raises:
        UserError: in all processes, what was raised in the first one.
    """
    problem = None
    try:
        yield
    except UserError as error:
        problem = error
    place.agree(problem)


def check_pair(student: Ghost, teacher: Ghost) -> None:
    """Raise UserError for two checkpoints of which one cannot learn from the other."""
    ours, theirs = student.model, teacher.model
    facts = {
        "family": (student.adapter.family.name, teacher.adapter.family.name),
        "mask token": (ours.config.mask_token_id, theirs.config.mask_token_id),
        "vocabulary": (ours.output_head.weight.shape[0], theirs.output_head.weight.shape[0]),
    }
    for name, (own, other) in facts.items():
        if own != other:
            raise UserError(
                f"'{student.name}' has the {name} {own} and the teacher '{teacher.name}' {other}: give the dense model"
                " that it was pruned from"
            )


def check_window(ghost: Ghost, length: int) -> None:
    """Raise UserError for windows longer than a model's positions."""
    longest = getattr(ghost.model.config, ghost.adapter.family.keys["positions"])
    if length > longest:
        raise UserError(f"data.length = {length} exceeds the {longest} positions of '{ghost.name}': lower it")


def check_teacher(config: RecoverConfig, cache: Path | None) -> None:
    """Raise UserError for settings of a teacher that contradict each other."""
    loss, teacher = config.loss, config.teacher
    if loss.kl == loss.cross_entropy == 0:
        raise UserError("loss.kl and loss.cross_entropy are both 0: nothing would be learnt, so set one of them")
    if cache is None:
        if teacher.top != TeacherSettings().top:
            raise UserError(
                f"teacher.top = {teacher.top} has no effect without --teacher-cache: leave it out, or add that"
            )
    elif loss.kl == 0:
        raise UserError(f"--teacher-cache {cache} has no effect with loss.kl = 0: leave it out")
    elif loss.temperature != 1:
        raise UserError(
            f"--teacher-cache {cache} keeps predictions at temperature 1: leave it out, or loss.temperature ="
            f" {loss.temperature:g}"
        )
