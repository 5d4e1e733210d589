"""Files that appear whole or not at all, and how their errors are told."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
def full_disk_errors(path: Path, remedy: str = "free some space, or choose another place", size: str = "") -> Iterator:
    """While writing `path`: a full disk is a UserError, whichever library met it; other errors pass.

    Args:
        size: what is written, in words.
    """
    try:
        yield
    except Exception as error:
        if not (_is_full(error) or (error.__cause__ is not None and _is_full(error.__cause__))):
            raise
        raise UserError(f"no space left while writing '{path}'{size}: {remedy}") from error


def _is_full(error: BaseException) -> bool:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or f"os error {errno.ENOSPC}" in str(error)  # safetensors gives it only as text


def lock(handle: int, shared: bool = False) -> bool:
    """Whether an open file or directory could be locked, alone or together with others, until it is closed.

    The system closes it when the process ends, in whichever way. A system or file system without locks has none to
    refuse: everything can be locked there.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return True
    return True


def make_folders(path: Path) -> list[Path]:
    """Make a directory and its parents; returns those that were not there, the innermost first."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return made


def remove_folders(made: list[Path]) -> None:
    """Undo `make_folders`, as far as its directories are empty."""
    for folder in made:
        with suppress(OSError):  # another process may use it by now
            folder.rmdir()


def bytes_in(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files in a folder and below it whose names have a pattern; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


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
