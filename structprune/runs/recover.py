"""Train a pruned checkpoint back against the dense one: `structprune recover`, without a console."""

import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from structprune.checkpoint.atomic import free_place, output_place
from structprune.checkpoint.output import check_apart, check_output, check_place, save_finished
from structprune.config.sections import within_positions
from structprune.errors import UserError
from structprune.recovery.blocks import remaining_blocks
from structprune.recovery.checks import check_settings, with_causal
from structprune.recovery.folder import LOGS, logs_of, opened_folder, training_folder
from structprune.recovery.settings import RecoverConfig
from structprune.recovery.trainer import passes_of, require_training
from structprune.runs.evaluate import ALONE, Session
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
    session: Session = ALONE,
) -> Recovered:
    """Train the model in `pruned` towards the predictions of `teacher`, and write it in its own layout.

    Checkpoints of the training lie beside the output, in `OUT.training`, until it is done; the same call goes on from
    the last one. What the held-out text shows to be no better is not written: the input is, and the report says so.

    Args:
        pruned, teacher: checkpoint directories or Hub ids.
        out: directory to write; it appears complete or not at all.
        overwrite: replace an earlier output, and forget an earlier training.
        session: progress, and the processes that share the training; the first one writes.
    Raises:
        UserError: anything the user can mend, before weights are read where it can be known then.
    """
    require_training()
    return train_back(checked(pruned, teacher, out, config, overwrite, session), out, overwrite, session)


def train_back(
    recovery: Recovery, out: Path, overwrite: bool = False, session: Session = ALONE, notes: dict | None = None
) -> Recovered:
    """Run a recovery that was checked, from its training folder on, and write its output.

    Args:
        out, overwrite, session: as it was checked with.
        notes: further entries of its report.
    Raises:
        UserError: a disk lacks the room, the training folder is another training's, or another process trains there;
            see `Recovery.run`.
    """
    if recovery.breadth["warning"] is not None:
        session.say(recovery.breadth["warning"])
    session.workers.first(lambda: recovery.check_room(out))
    with ExitStack() as stack:
        opening = opened_folder(out, recovery.identity, overwrite)
        session.workers.first(lambda: stack.enter_context(opening))
        report = recovery.run(training_folder(out)) | (notes or {})
        session.workers.first(lambda: _finish(recovery, out, report, overwrite))
    return Recovered(out, report)


def _finish(recovery: Recovery, out: Path, report: dict, overwrite: bool) -> None:
    """Write the output, and remove what the training needed."""
    folder = training_folder(out)
    save_finished(lambda path, replace: recovery.save(path, report, replace), out, overwrite)
    if (logs := logs_of(folder)) is not None:  # they outlive the training
        place = out.absolute().with_name(f"{out.name}.{LOGS}")
        shutil.move(logs, free_place(place) if os.path.lexists(place) else place)
    shutil.rmtree(folder)


def checked(
    pruned: str,
    teacher: str,
    out: Path,
    config: RecoverConfig,
    overwrite: bool = False,
    session: Session = ALONE,
) -> Recovery:
    """A recovery that can be run, or planned with; no weights are read. Arguments and errors as `recover`."""
    ghosts = read_ghost(pruned, config.model), read_ghost(teacher, config.model)
    config = with_length(config, ghosts)
    config, cache = check_request(ghosts, config, session)
    session.workers.first(lambda: check_places(out, ghosts, overwrite, cache))
    return Recovery(ghosts, config, cache, session)


def check_request(
    ghosts: tuple[Ghost, Ghost], config: RecoverConfig, session: Session
) -> tuple[RecoverConfig, Path | None]:
    """Raise UserError for models and settings that do not go together, wherever the output is.

    Returns:
        The configuration with what these models decide of it, and the directory of the teacher's predictions; None: it
        predicts on the way.
    """
    check_pair(*ghosts)
    for ghost in ghosts:
        check_window(ghost, config.data.length)
    passes_of(config.train, session.workers.count)
    check_settings(config)
    config = with_causal(config, ghosts[0].model)
    if config.blocks.tokens or config.loss.streams:
        remaining = remaining_blocks(ghosts[0].directory, ghosts[0].adapter, ghosts[1].adapter)
        if config.loss.streams and len(remaining) == 1:
            raise UserError(
                f"loss.streams = {config.loss.streams:g} is of all blocks but the last, and '{ghosts[0].name}' has one:"
                " leave it out"
            )
    return config, None if config.teacher.cache is None else output_place(config.teacher.cache)


def check_places(out: Path, ghosts: tuple[Ghost, Ghost], overwrite: bool, cache: Path | None) -> None:
    """Raise UserError where output, training folder, cache and both checkpoints cannot lie where they are asked to."""
    student, teacher = (ghost.directory for ghost in ghosts)
    check_output(out, student, overwrite, ghosts[0].stored_bytes)
    places = [out, training_folder(out), *([] if cache is None else [cache])]
    for place in places:
        for checkpoint in (student, teacher):
            check_apart(place, checkpoint, overwrite=True)
    if cache is None:
        return
    check_place(cache)
    if cache.exists() and not cache.is_dir():
        raise UserError(f"teacher.cache = {cache} is a file: give a directory")
    one = cache.resolve()
    for other in (place.resolve() for place in places[:2]):
        if one == other or one in other.parents or other in one.parents:
            raise UserError(f"teacher.cache = {cache} and '{other}' lie in each other: give them places of their own")


def check_pair(student: Ghost, teacher: Ghost) -> None:
    """Raise UserError for two checkpoints of which one cannot learn from the other."""
    ours, theirs = student.model, teacher.model
    sizes = [getattr(model.config, "block_size", None) for model in (ours, theirs)]
    types = [ghost.adapter.family.model_types for ghost in (student, teacher)]
    if types[0] == types[1] and sizes.count(None) == 1:
        known, other = (student, teacher) if sizes[0] else (teacher, student)
        remedy = f"give --block-size {max(filter(None, sizes))}"
        raise UserError(f"'{known.name}' works in blocks, and '{other.name}' does not say that it does: {remedy}")
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


def with_length(config: RecoverConfig, ghosts: Iterable[Ghost]) -> RecoverConfig:
    """The configuration with windows that all models take, where it names no length."""
    shortest = min(ghost.adapter.positions for ghost in ghosts)
    return config.model_copy(update={"data": within_positions(config.data, shortest)})


def check_window(ghost: Ghost, length: int) -> None:
    """Raise UserError for windows longer than a model's positions."""
    longest = ghost.adapter.positions
    if length > longest:
        raise UserError(f"data.length = {length} exceeds the {longest} positions of '{ghost.name}': lower it")
