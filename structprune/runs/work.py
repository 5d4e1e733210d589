"""Where a run keeps what it has finished, so that the same command goes on after a kill."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers

from structprune import __version__
from structprune.checkpoint.output import check_apart, check_place
from structprune.config import Config
from structprune.errors import UserError, shown
from structprune.files import (
    bytes_in,
    first_line,
    full_disk_errors,
    is_draft,
    lock,
    make_folders,
    remove_folders,
    write_whole,
)
from structprune.models.fingerprint import fingerprint
from structprune.models.journal import NOWHERE, Journal, unwatched
from structprune.runs.ghost import Ghost
from structprune.runs.run import CALIBRATION
from structprune.runs.stages import digest, text_digest
from structprune.workers import ALONE, Workers

IDENTITY, LOCK, WRITTEN, REHEARSED = "identity.json", ".lock", "written", "rehearsed"
# of a work directory, beside parts of its own
FOLDERS = ("scores", "refits", "masks", "levels", "reverse", "drops", WRITTEN, REHEARSED)
SUFFIX = ".safetensors"
FORMAT = "structprune-work-1"
Resume = Literal["auto", "required", "never"]
RESUMES = get_args(Resume)
FIXED = ("calibration", "sink", "model")  # sections that decide every part; others are in the names of parts
INDIFFERENT: Any = {"calibration": {"batch", "source"}, "model": {"device", "allow_pickle"}}  # only rounding, or apart


@dataclass(frozen=True)
class Work:
    """Where and how a run keeps its parts, and who shares it.

    Attributes:
        directory: of the parts; None: none are kept.
        levels: directory for the levels of a search, which stay there for later or interrupted runs; None: they are
            parts like others.
        resume: auto: go on from them where there are any; required: refuse a run without; never: begin anew.
        stays: leave them there when all outputs are written, for other ratios, export classes and scores.
        watch: called after every part, and between the steps of others; what it raises ends the run.
        restart: the option that begins anew, for messages.
        workers: the processes that share the run; each gives the same work.
        taken: what the run did not have to do again, in words, once it has.
    """

    directory: Path | None = None
    levels: Path | None = None
    resume: Resume = "auto"
    stays: bool = False
    watch: Callable[[], None] = unwatched
    restart: str = "--resume never"
    workers: Workers = ALONE
    taken: set[str] = field(default_factory=set, compare=False)

    def journal(self) -> Journal:
        """What an earlier run has kept."""
        return Journal(self.directory, self.watch, self.workers, taken=self.taken)


NO_WORK = Work()


def work_beside(out: Path) -> Path:
    """Where the parts of a run lie if nothing else is said: beside its output."""
    place = Path(os.path.abspath(out))
    return place.with_name(f"{place.name}.work") if place.name else place / "structprune.work"


def work_identity(ghost: Ghost, config: Config, device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What decides all parts of a run, as plain data without paths: key -> value.

    What only decides memory or rounding may change: `memory`, and `calibration.batch` and the number of processes but
    for a reverse trajectory, whose likeliest tokens can turn on rounding.
    """
    sections = config.model_dump(mode="json", include=set(FIXED), exclude=INDIFFERENT)
    keys = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    if config.sink.trajectory == "reverse":
        keys |= {"calibration.batch": config.calibration.batch, "number of processes": processes}
    versions = {"structprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "format": FORMAT,
        "checkpoint": _content(ghost, config.model.allow_pickle),
        "text": text_digest(config.calibration.source),
        **keys,
        "device": device.type,
        **{f"version of {name}": version for name, version in versions.items()},
    }


def _content(ghost: Ghost, allow_pickle: bool) -> str | None:
    """What a checkpoint is known by; None for a directory without weights, which a dry run may inspect."""
    try:
        return ghost.identity(allow_pickle)
    except UserError:
        return None


def check_work(work: Work, identity: dict[str, Any], places: Iterable[Path], source: Path) -> None:
    """Raise UserError where the parts cannot be kept, are another run's, or are required and not there.

    Args:
        places: directories and files that the run writes or reads. source: the checkpoint's directory.
    """
    directory = work.directory
    if work.resume not in RESUMES:
        raise UserError(f"unknown --resume '{work.resume}': give {', '.join(RESUMES)}")
    if directory is None:
        return
    before = _read(directory / IDENTITY)
    check_apart(directory, source, overwrite=True)
    for place in places:
        one, other = directory.resolve(), place.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise UserError(f"--work {directory} and '{place}' lie in each other: give them places of their own")
    if before is None and os.path.lexists(directory) and not _is_empty(directory):
        raise UserError(f"'{directory}', where finished parts would be kept, is something else: give another --work")
    try:
        check_place(directory / IDENTITY if directory.is_dir() else directory)
    except UserError as error:
        raise UserError(f"finished parts cannot be kept ({error}): give --work another place") from error
    if work.resume == "required" and before is None:
        raise UserError(f"--resume required, and '{directory}' has no part of a run: leave it out to begin one")
    if work.resume != "never" and before is not None:
        _check_same(work, before, identity)


def _check_same(work: Work, before: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise UserError for parts of another run, naming the first thing that changed."""
    for key in [key for key in {**before, **identity} if before.get(key) != json.loads(json.dumps(identity.get(key)))]:
        hashed = key in ("checkpoint", "text")
        change = f"another {key}" if hashed else f"{key} = {shown(before.get(key))}, not {shown(identity.get(key))}"
        raise UserError(
            f"'{work.directory}' has parts of a run with {change}: give the same, {work.restart} to begin anew, or"
            " delete them"
        )


@contextmanager
def working(work: Work, identity: Callable[[], dict[str, Any]]) -> Iterator[Journal]:
    """A run's journal. It is removed at the end, unless it stays; after an error, if no part was finished.

    Of several processes the first one opens and removes it.

    Args:
        work: checked by `check_work`.
    Raises:
        UserError: another run works there, or nothing can be written.
    """
    if work.directory is None:
        yield NOWHERE
        return
    with ExitStack() as stack:
        work.workers.first(lambda: stack.enter_context(_opened(work, identity)))
        yield work.journal()


@contextmanager
def _opened(work: Work, identity: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """`working` in the process that reads and writes."""
    directory, made = work.directory, []
    assert directory is not None
    try:
        made = make_folders(directory)
        file = (directory / LOCK).open("w")
    except OSError as error:
        remove_folders(made)
        raise UserError(f"finished parts cannot be kept ({first_line(error)}): give --work another place") from error
    with file:
        if not lock(file.fileno()):
            raise UserError(f"another run works in '{directory}': wait for it, or give another --work")
        if work.resume == "never" and _read(directory / IDENTITY) is not None:
            _clear_parts(directory)
        if not (directory / IDENTITY).exists():
            try:
                with full_disk_errors(directory):
                    write_whole(directory / IDENTITY, (json.dumps(identity(), indent=1) + "\n").encode())
            except BaseException:
                (directory / LOCK).unlink(missing_ok=True)
                remove_folders([directory, *(folder for folder in made if folder != directory)])
                raise
        try:
            yield
        except BaseException:
            if not has_parts(directory):
                clear(directory, made)
            raise
        if work.stays:
            _remove(directory / WRITTEN)
        else:
            clear(directory, made)


def clear(directory: Path, made: Iterable[Path] = ()) -> None:
    """Remove what a run keeps in a directory, and nothing else; then itself, and folders that were made, if empty."""
    if _read(directory / IDENTITY) is None:
        return
    _clear_parts(directory)
    (directory / LOCK).unlink(missing_ok=True)
    remove_folders([directory, *(folder for folder in made if folder != directory)])


def _clear_parts(directory: Path) -> None:
    for path in list(directory.iterdir()):
        if path.suffix == SUFFIX or is_draft(path):  # a kill leaves drafts
            path.unlink(missing_ok=True)
    for name in FOLDERS:
        _remove(directory / name)
    (directory / IDENTITY).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def has_parts(directory: Path | None) -> bool:
    """Whether a run has finished any part there; its calibration, which is made in a moment, does not count, and
    neither does a rehearsal."""
    if directory is None:
        return False
    return any(path.stem != CALIBRATION and path.parent.name != REHEARSED for path in directory.rglob(f"*{SUFFIX}"))


def kept_bytes(directory: Path) -> int:
    """Bytes of the parts there."""
    return bytes_in(directory, f"*{SUFFIX}")


def output_part(ratio: float | None, config: Config) -> str:
    """The name of the part that says that the output of a ratio was written."""
    return f"{ratio}-{digest(config.model_dump(mode='json', exclude={'memory'}))}"


def output_notes(out: Path) -> dict[str, str]:
    """Where an output is and what it holds, for its part."""
    return {"out": str(out.resolve()), "content": fingerprint(out)}


def is_written(work: Work, ratio: float | None, out: Path, config: Config) -> bool:
    """Whether an earlier run of the same work wrote the output of a ratio, and it is still that."""
    if work.resume == "never" or not (out / "config.json").exists():
        return False
    kept = Journal(work.directory).within(WRITTEN).read(output_part(ratio, config))
    try:
        return kept is not None and kept.notes == output_notes(out)
    except UserError:  # something without weights
        return False


def _read(path: Path) -> dict[str, Any] | None:
    """The identity of a run's parts; None where there is none."""
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return identity if isinstance(identity, dict) and identity.get("format") == FORMAT else None


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(path.name != LOCK for path in directory.iterdir())
