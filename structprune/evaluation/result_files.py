"""Results on disk: chunk by chunk while a run is under way, one file per checkpoint and task at its end.

A run's directory holds

    settings.json                      what the results depend on
    partial/rank-0.jsonl, ...          a line per finished chunk, from each process; removed at the end
    predictions/<window>.safetensors   with evaluation.fidelity: the first checkpoint's (`prediction_files`)
    items/<checkpoint>/<task>.jsonl    a line per item
    results.json                       settings, summary, and what is in items/; written last

Every process of the run has the directory locked together with the others, and its own file in partial/ alone.
"""

import fcntl
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from structprune.errors import UserError
from structprune.evaluation.labels import safe_names
from structprune.evaluation.result_state import (
    ITEMS,
    PARTIAL,
    RESULTS,
    SETTINGS,
    erase,
    foreign_entries,
    has_rows,
    lock_results,
    refuse_foreign,
    remove_drafts,
    stored_chunks,
)
from structprune.evaluation.results import (
    DAMAGED,
    Row,
    RunRows,
    json_line,
    json_text,
    plain_os_errors,
    read_object,
    read_rows,
    setting_differences,
    to_json,
)
from structprune.files import check_regular, make_folders, remove_folders, write_whole

Keys = Mapping[str, Mapping[str, Sequence[str]]]  # checkpoint -> task -> keys of its items, in order


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
        self._handle: int | None = None  # of the directory
        self._made: list[Path] = []
        self.finished = False
        try:
            with plain_os_errors(self.directory):
                self._open()
        except BaseException:
            self.discard()
            self.close()
            raise

    def _open(self) -> None:
        """Lock and claim the directory, and read what is stored."""
        refuse_foreign(self.directory)
        self._made = make_folders(self.directory)
        self._handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        lock_results(self._handle, self.directory, alone=False)
        self._claim()
        self.finished = (self.directory / RESULTS).is_file()
        if self.finished:
            return
        self._path.parent.mkdir(exist_ok=True)
        check_regular(self._path)  # a pipe would be waited for
        self._file = FileIO(self._path, "a")
        lock_results(self._file.fileno(), self.directory, alone=True)
        os.truncate(self._path, self._path.read_bytes().rfind(b"\n") + 1)  # a line that a killed process left
        for each in stored_chunks(self.directory):
            self._done[each.checkpoint, each.task].add(each.chunk)

    def __enter__(self) -> "ResultStore":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Release the results; after an error, also forget a run that has stored nothing."""
        if error is not None:
            self.discard()
        self.close()

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

    def rows(self, checkpoint: str, task: str) -> dict[str, Row]:
        """The rows stored so far, by any process, by their keys."""
        chunks = (each for each in stored_chunks(self.directory) if (each.checkpoint, each.task) == (checkpoint, task))
        return {row.key: row for each in chunks for row in each.rows}

    def finish(self, keys: Keys, summarise: Callable[[RunRows], dict]) -> Results:
        """Merge the chunks of all processes, in the order of the keys; call it in one process, once all are done.

        Raises:
            UserError: items are missing, or there is no space left.
        """
        earlier = read_results(self.directory) if self.finished else None
        if earlier is None:
            rows = self._merged(keys)
        else:  # in the order of the keys, because the others are compared with the first checkpoint
            try:
                rows = {name: {task: earlier.rows[name][task] for task in tasks} for name, tasks in keys.items()}
            except KeyError as error:
                raise UserError(f"'{self.directory / RESULTS}' lacks {error}: {DAMAGED}") from error
        summary = summarise(rows)
        if earlier is None or summary != earlier.summary or list(rows) != list(earlier.rows):
            with plain_os_errors(self.directory):
                values = {"settings": self.settings, "summary": summary, "files": self._write_items(rows)}
                write_whole(self.directory / RESULTS, json_text(values))
        self.close()
        self.finished = True
        shutil.rmtree(self.directory / PARTIAL, ignore_errors=True)
        remove_drafts(self.directory)
        return read_results(self.directory)

    def discard(self) -> None:
        """Remove what opening has written, if this run is refused before anything is stored.

        Otherwise the next run, perhaps with what this one was refused for mended, would meet other settings.
        """
        if self._handle is None:  # the directory was not even opened
            remove_folders(self._made)
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process is here: of this run, or of another
            return
        if not has_rows(self.directory) and not foreign_entries(self.directory):
            erase(self.directory)
            remove_folders(self._made)

    def close(self) -> None:
        """Release the directory and the file, so that another process can write this rank's results."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

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
        """Write the settings, or check that those which are there are the same."""
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
        for each in stored_chunks(self.directory):
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


def _inside(directory: Path, name: str) -> Path:
    """A file of the results, which lies in their directory.

    Raises:
        ValueError: it does not, or is no file.
    """
    path, parts = directory / name, Path(name).parts
    if ".." in parts or Path(name).is_absolute() or (path.exists() and not path.is_file()):
        raise ValueError(name)
    return path


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
        if not isinstance(values["summary"], dict):
            raise TypeError("summary")
        rows = {
            checkpoint: {
                task: read_rows(_inside(directory, each["file"]), each["items"]) for task, each in tasks.items()
            }
            for checkpoint, tasks in values["files"].items()
        }
        return Results(directory, values["settings"], values["summary"], rows)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, OSError) as error:
        raise UserError(f"'{directory / RESULTS}' is damaged: {DAMAGED}") from error
