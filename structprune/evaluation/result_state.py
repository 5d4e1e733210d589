"""The state of a directory of results: whether a run is writing it, what it has stored, and its removal."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from structprune.errors import UserError
from structprune.evaluation.results import Row, parse_line, plain_os_errors, read_object, setting_differences
from structprune.files import check_regular, is_draft, lock

RESULTS, SETTINGS, PARTIAL, ITEMS = "results.json", "settings.json", "partial", "items"
PREDICTIONS = "predictions"
COMPARISON = "against.json"


@dataclass(frozen=True)
class Chunk:
    """A line of a file in `partial/`."""

    checkpoint: str
    task: str
    chunk: int | str
    rows: Sequence[Row]


CHUNK = TypeAdapter(Chunk)


def _rank_files(directory: Path) -> list[Path]:
    return sorted((directory / PARTIAL).glob("rank-*.jsonl"))


def stored_chunks(directory: Path) -> Iterator[Chunk]:
    """Complete chunks of all processes; one may occur twice, where two runs had different numbers of processes."""
    for path in _rank_files(directory):
        check_regular(path)
        text = path.read_bytes()
        for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
            yield parse_line(line, CHUNK, path, number)


def has_rows(directory: Path) -> bool:
    """Whether anything is stored: finished results, or a whole chunk, readable or not."""
    with plain_os_errors(directory):
        return (directory / RESULTS).is_file() or any(
            not path.is_file() or b"\n" in path.read_bytes() for path in _rank_files(directory)
        )


def lock_results(handle: int, directory: Path, alone: bool) -> None:
    """Lock an open directory of results, or a file of it, alone or with others, until the handle is closed.

    Raises:
        UserError: another run has it.
    """
    if not lock(handle, shared=not alone):
        raise UserError(f"output '{directory}' is being written by another run: wait for it")


def clear_results(directory: str | Path) -> None:
    """Remove earlier results, finished or not; call it in one process, before any store is opened.

    Raises:
        UserError: the directory holds something else, or a run is writing it.
    """
    directory = Path(directory)
    with plain_os_errors(directory), ExitStack() as files:
        refuse_foreign(directory)
        if others := foreign_entries(directory):
            name = others[0].relative_to(directory)
            raise UserError(f"output '{directory}' also holds '{name}': move it away, or choose another --out")
        try:
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        files.callback(os.close, handle)
        lock_results(handle, directory, alone=True)
        for path in _rank_files(directory):  # they too, for where directories cannot be locked
            lock_results(files.enter_context(path.open("r+b")).fileno(), directory, alone=True)
        erase(directory)


def erase(directory: Path) -> None:
    """Remove all that belongs to results; call it with the directory held alone, and without `foreign_entries`."""
    (directory / RESULTS).unlink(missing_ok=True)  # first, so that the rest is never taken for finished results
    (directory / COMPARISON).unlink(missing_ok=True)
    for name in (PARTIAL, ITEMS, PREDICTIONS):
        shutil.rmtree(directory / name, ignore_errors=True)
    remove_drafts(directory)
    (directory / SETTINGS).unlink(missing_ok=True)  # last, because without them the rest is of somebody else


def is_resumable(directory: str | Path, settings: dict) -> bool:
    """Whether a directory holds unfinished, undamaged results of the same settings.

    Raises:
        UserError: there can be no such directory.
    """
    directory = Path(directory)
    with plain_os_errors(directory):
        if not (directory / SETTINGS).is_file() or (directory / RESULTS).is_file():
            return False
    try:
        stored = read_object(directory / SETTINGS)["settings"]
        list(stored_chunks(directory))
    except (UserError, OSError):  # damaged
        return False
    return not setting_differences(stored, settings)


def remove_drafts(directory: Path) -> None:
    """Remove what processes left that were killed while they wrote (`whole_file`)."""
    for pattern in (".*.json.*.tmp", f"{ITEMS}/*/.*.jsonl.*.tmp", f"{PREDICTIONS}/.*.safetensors.*.tmp"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def foreign_entries(directory: Path) -> list[Path]:
    """What is in a directory of results that no evaluation has written, and would be lost with them."""
    if not directory.is_dir():
        return []
    paths = [path for path in directory.rglob("*") if not is_draft(path)]
    return [path for path in sorted(paths) if not _is_ours(path, path.relative_to(directory).parts)]


def _is_ours(path: Path, parts: tuple[str, ...]) -> bool:
    """Whether a path, whose `parts` are below the directory of results, has the name and kind of one of them."""
    if path.is_symlink():
        return False
    depth = {PARTIAL: 2, ITEMS: 3, PREDICTIONS: 2}.get(parts[0], 1)
    if len(parts) < depth:
        return path.is_dir()
    suffix = ".safetensors" if parts[0] == PREDICTIONS else ".jsonl"
    known = parts[0] in (RESULTS, SETTINGS, COMPARISON) if depth == 1 else path.suffix == suffix
    return known and len(parts) == depth and path.is_file()


def refuse_foreign(directory: Path) -> None:
    """Raise UserError for what is no directory of results; other files are never written over or removed."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output '{directory}' is not a directory: choose another --out")
    if not directory.is_dir():
        return
    others = any(not is_draft(path) for path in directory.iterdir())
    if others and not (directory / SETTINGS).is_file():  # asked last: another process of this run may just write them
        raise UserError(f"output '{directory}' holds something else than results: choose another --out")
