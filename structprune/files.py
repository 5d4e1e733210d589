"""Files that appear whole or not at all, and how their errors are told."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from structprune.errors import UserError


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_regular(path: Path) -> None:
    """Raise UserError for a directory, FIFO or device in a file's place, which reading would wait for."""
    if path.exists() and not path.is_file():
        raise UserError(
            f"{path} is a {'directory' if path.is_dir() else 'pipe or device'}, not a file: put the file there"
        )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft beside `path` to write: renamed into place at the end, removed when anything is raised.

    Processes that write the same file at once do not meet: every draft has a name of its own.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file and its folders; the file is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft, open(draft, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def is_draft(path: Path) -> bool:
    """Whether a process was killed while it wrote this."""
    return path.name.startswith(".") and path.name.endswith(".tmp")
