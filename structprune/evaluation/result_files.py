"""Results on disk: chunk by chunk while a run is under way, one file per checkpoint and task at its end.

A run's directory holds

    settings.json                      what the results depend on
    partial/rank-0.jsonl, ...          a line per finished chunk, from each process; removed at the end
    items/<checkpoint>/<task>.jsonl    a line per item
    results.json                       settings, summary, and what is in items/; written last
"""

import fcntl
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from pydantic import TypeAdapter

from structprune.errors import UserError
from structprune.evaluation.labels import safe_names
from structprune.evaluation.results import (
    DAMAGED,
    Row,
    RunRows,
    json_line,
    json_text,
    parse_line,
    plain_os_errors,
    read_object,
    read_rows,
    to_json,
)
from structprune.files import is_draft, write_whole

RESULTS, SETTINGS, PARTIAL, ITEMS = "results.json", "settings.json", "partial", "items"
Keys = Mapping[str, Mapping[str, Sequence[str]]]  # checkpoint -> task -> keys of its items, in order


@dataclass(frozen=True)
class Chunk:
    """A line of a file in `partial/`."""

    checkpoint: str
    task: str
    chunk: int | str
    rows: Sequence[Row]


CHUNK = TypeAdapter(Chunk)


@dataclass(frozen=True)
class Results:
    """A finished run, read back."""

    directory: Path
    settings: dict
    summary: dict
    rows: dict[str, dict[str, list[Row]]]


class ResultStore:
    """The results of a run under way: whole chunks are stored as they finish, and found when the run starts again.

    A chunk's name must stand for the same items whenever the settings are the same, on any number of processes.

    Args:
        directory: shared by all processes of the run; rank: number of this one, which writes its own file.
        settings: plain values that the results depend on.
    Raises:
        UserError: the directory cannot be written, holds something else or results of other settings, or another
            process is writing them.
    """

    def __init__(self, directory: str | Path, settings: dict, rank: int = 0):
        self.directory = Path(directory)
        self.settings = settings
        self._path = self.directory / PARTIAL / f"rank-{rank}.jsonl"
        self._done: defaultdict[tuple[str, str], set[int | str]] = defaultdict(set)
        self._file: FileIO | None = None
        with plain_os_errors(self.directory):
            self._claim()
            self.finished = (self.directory / RESULTS).is_file()
            if self.finished:
                return
            self._path.parent.mkdir(exist_ok=True)
            self._file = FileIO(self._path, "a")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, in whichever way
            except BlockingIOError as error:
                raise UserError(f"output '{self.directory}' is being written by another run: wait for it") from error
            os.truncate(self._path, self._path.read_bytes().rfind(b"\n") + 1)  # a line that a killed process left
            for each in _chunks(self.directory):
                self._done[each.checkpoint, each.task].add(each.chunk)

    def done(self, checkpoint: str, task: str) -> set[int | str]:
        """Complete chunks, of any process."""
        return set(self._done[checkpoint, task])

    def add(self, checkpoint: str, task: str, chunk: int | str, rows: Sequence[Row]) -> None:
        """Store a chunk: it is on disk when this returns, and not at all if the process ends before.

        Raises:
            UserError: no space left.
        """
        if self._file is None:
            raise RuntimeError("finished results take no more chunks")
        record = {"checkpoint": checkpoint, "task": task, "chunk": chunk, "rows": [to_json(row) for row in rows]}
        before = self._path.stat().st_size
        try:
            with plain_os_errors(self._path):
                rest = memoryview(json_line(record))
                while rest:  # once, unless the disk is nearly full
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
        except BaseException:
            os.truncate(self._path, before)
            raise
        self._done[checkpoint, task].add(chunk)

    def finish(self, keys: Keys, summarise: Callable[[RunRows], dict]) -> Results:
        """Merge the chunks of all processes, in the order of the keys; call it in one process, once all are done.

        Raises:
            UserError: items are missing, or there is no space left.
        """
        earlier = read_results(self.directory) if self.finished else None
        if earlier is None:
            rows = self._merged(keys)
        else:  # in the order of the keys, because the others are compared with the first checkpoint
            rows = {name: {task: earlier.rows[name][task] for task in tasks} for name, tasks in keys.items()}
        summary = summarise(rows)
        if earlier is None or summary != earlier.summary or list(rows) != list(earlier.rows):
            with plain_os_errors(self.directory):
                values = {"settings": self.settings, "summary": summary, "files": self._write_items(rows)}
                write_whole(self.directory / RESULTS, json_text(values))
        self.close()
        self.finished = True
        shutil.rmtree(self.directory / PARTIAL, ignore_errors=True)
        _remove_drafts(self.directory)
        return read_results(self.directory)

    def close(self) -> None:
        """Release the file, so that another process can write this rank's results."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_items(self, rows: RunRows) -> dict[str, dict[str, dict]]:
        """Write every task's items; returns checkpoint -> task -> its file and its number of items."""
        files: defaultdict[str, dict[str, dict]] = defaultdict(dict)
        for checkpoint, tasks in rows.items():
            names = safe_names(list(tasks))
            for task, each in tasks.items():
                path = f"{ITEMS}/{checkpoint}/{names[task]}.jsonl"
                write_whole(self.directory / path, b"".join(json_line(to_json(row)) for row in each))
                files[checkpoint][task] = {"file": path, "items": len(each)}
        return files

    def _claim(self) -> None:
        """Make the directory, or check that it has the same settings."""
        _refuse_foreign(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / SETTINGS
        if not path.exists():  # processes that start together write the same
            write_whole(path, json_text({"settings": self.settings}))
        if changes := setting_differences(read_object(path)["settings"], self.settings):
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise UserError(
                f"output '{self.directory}' holds results of other settings: {changes[0]}{more}:"
                " add --overwrite, or choose another --out"
            )

    def _merged(self, keys: Keys) -> RunRows:
        """The rows of all chunks, the first of equal keys, in the order of the keys."""
        rows: dict[tuple[str, str, str], Row] = {}
        for each in _chunks(self.directory):
            for row in each.rows:
                rows.setdefault((each.checkpoint, each.task, row.key), row)
        for checkpoint, tasks in keys.items():
            for task, names in tasks.items():
                if missing := [name for name in names if (checkpoint, task, name) not in rows]:
                    raise UserError(
                        f"output '{self.directory}' lacks {len(missing)} of {len(names)} items of task '{task}' of"
                        f" '{checkpoint}' (first '{missing[0]}'): run the same command again"
                    )
        return {
            checkpoint: {task: [rows[checkpoint, task, name] for name in names] for task, names in tasks.items()}
            for checkpoint, tasks in keys.items()
        }


def _chunks(directory: Path) -> Iterator[Chunk]:
    """Complete chunks of all processes; one may occur twice, where two runs had different numbers of processes."""
    for path in sorted((directory / PARTIAL).glob("rank-*.jsonl")):
        text = path.read_bytes()
        for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
            yield parse_line(line, CHUNK, path, number)


def read_results(directory: str | Path) -> Results:
    """The results of a finished run.

    Raises:
        UserError: there are no results, or unfinished or damaged ones.
    """
    directory = Path(directory)
    if not (directory / RESULTS).is_file():
        if (directory / SETTINGS).is_file():
            raise UserError(f"the results in '{directory}' are not finished: run the command that made them again")
        raise UserError(f"'{directory}' holds no results of structprune eval: name its --out")
    values = read_object(directory / RESULTS)
    try:
        rows = {
            checkpoint: {task: read_rows(directory / each["file"], each["items"]) for task, each in tasks.items()}
            for checkpoint, tasks in values["files"].items()
        }
        return Results(directory, values["settings"], values["summary"], rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{directory / RESULTS}' is damaged: {DAMAGED}") from error


def clear_results(directory: str | Path) -> None:
    """Remove earlier results, finished or not; call it in one process, before any store is opened.

    Raises:
        UserError: the directory holds something else.
    """
    directory = Path(directory)
    with plain_os_errors(directory):
        _refuse_foreign(directory)
        (directory / RESULTS).unlink(missing_ok=True)  # first, so that the rest is never taken for finished results
        for name in (PARTIAL, ITEMS):
            shutil.rmtree(directory / name, ignore_errors=True)
        (directory / SETTINGS).unlink(missing_ok=True)
        _remove_drafts(directory)


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
        list(_chunks(directory))
    except (UserError, OSError):  # damaged
        return False
    return not setting_differences(stored, settings)


def setting_differences(old: dict, new: dict) -> list[str]:
    """The differences in words, `seed was 0 and is 1`; nested settings under dotted names."""
    before, after = _flat(old), _flat(new)
    differences = []
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            texts = (values.get(name, "not set") for values in (before, after))
            was, now = (text if len(text) <= 80 else f"{text[:77]}..." for text in texts)
            differences.append(f"{name} was {was} and is {now}")
    return differences


def _flat(values: dict, prefix: str = "") -> dict[str, str]:
    """Dotted name -> the value as JSON."""
    texts: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            texts |= _flat(value, f"{prefix}{name}.")
        else:
            texts[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False)
    return texts


def _remove_drafts(directory: Path) -> None:
    """Remove what processes left that were killed while they wrote (`whole_file`)."""
    for pattern in (".*.json.*.tmp", f"{ITEMS}/*/.*.jsonl.*.tmp"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def _refuse_foreign(directory: Path) -> None:
    """Raise UserError for a directory that holds other files, which are never written over or removed."""
    if not directory.is_dir() or (directory / SETTINGS).is_file():
        return
    if any(not is_draft(path) for path in directory.iterdir()):
        raise UserError(f"output '{directory}' holds something else than results: choose another --out")
