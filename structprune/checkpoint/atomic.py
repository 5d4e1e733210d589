"""Output directories that appear complete or not at all."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from structprune.checkpoint.drafts import Draft, clean_up, new_draft
from structprune.checkpoint.swap import exchange, rename_new, signals_wait
from structprune.errors import Interrupted, UserError
from structprune.files import make_folders, remove_folders

MOUNTS = Path("/proc/self/mountinfo")  # os.path.ismount does not see a directory mounted from the same file system
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


@contextmanager
def whole_directory(directory: str | Path, replaces: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields a draft beside `directory` to write into. It is renamed into place at the end, or removed after an error.

    A directory that cannot be renamed over (`is_fixed`) has the draft in it, and gets its entries at the end.

    Args:
        replaces: an earlier `directory` with one of these files is replaced once the draft is complete.
    Raises:
        UserError: something else has come to `directory` meanwhile, or the system refuses to put the draft in place:
            the complete draft is then kept beside it as `directory`.new, which the message names.
        Interrupted: by a signal during the last step, which was completed first.
    """
    directory = output_place(directory)
    clean_up(directory)
    before, home = _identity(directory), directory if is_fixed(directory) else directory.parent
    made, complete = make_folders(home), False
    try:
        with new_draft(directory, home) as draft:
            yield draft.path
            _open_up(draft.path)
            with signals_wait():
                _put_in_place(draft, before, replaces)
                complete = True
                draft.settle()
    except (KeyboardInterrupt, Interrupted) as error:
        if complete:
            raise Interrupted(f"'{directory}' was complete by then") from error
        raise KeyboardInterrupt from error  # whatever is complete in the draft goes with it
    finally:
        if not directory.exists():
            remove_folders(made)


def output_place(path: str | Path) -> Path:
    """An absolute path whose last part is a name, where `path` may end in `..`; of a link to a directory, its target.

    Raises:
        UserError: a loop of links.
    """
    path = Path(path).absolute()
    try:
        if path.name == ".." or (path.is_symlink() and path.is_dir()):
            return path.resolve()
        path.resolve()
        return path.parent.resolve() / path.name if ".." in path.parts else path
    except (RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            return path
        raise UserError(f"output '{path}' is a loop of links: choose another") from error


def is_fixed(directory: Path) -> bool:
    """Whether nothing can take a directory's place: it is a mount point, or holds the current directory."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    place = directory.resolve()
    current = Path.cwd()
    return place in (current, *current.parents) or os.path.ismount(place) or str(place) in _mount_points()


def may_replace(directory: Path, replaces: tuple[str, ...]) -> bool:
    """Whether a directory is empty, or an earlier output: it has one of the files `replaces`."""
    return directory.is_dir() and (
        not any(directory.iterdir()) or any((directory / name).exists() for name in replaces)
    )


def _mount_points() -> list[str]:
    with suppress(OSError):
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in lines]
    return []


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells whether the same thing is still at `path`; None where there is nothing."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _open_up(draft: Path) -> None:
    """Give files the usual modes: those of drafts and safetensors are private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (draft, *draft.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _put_in_place(draft: Draft, before: tuple[int, int] | None, replaces: tuple[str, ...]) -> None:
    """Give a complete draft its name, if there is still what was there `before`; what it replaces becomes the draft."""
    directory = draft.output
    try:
        if draft.home == directory:
            _fill(draft)
        elif before is None or not os.path.lexists(directory):
            rename_new(draft.path, directory)
        elif _identity(directory) != before or not may_replace(directory, replaces):
            raise _taken(directory)
        elif directory.is_symlink() or any(directory.iterdir()):
            exchange(draft.path, directory, draft.old)
            if _identity(draft.path) != before:  # another run was faster
                exchange(draft.path, directory, draft.old)
                raise _taken(directory)
        else:
            os.rename(draft.path, directory)  # refused by the system where it is not empty by now
    except OSError as error:
        _keep(draft, error)


def _fill(draft: Draft) -> None:
    """Move a draft's entries into the directory that it lies in."""
    if any(path not in (draft.path, draft.lock) for path in draft.output.iterdir()):
        raise _taken(draft.output)
    os.rename(draft.path, draft.full)
    draft.move_in()


def _taken(directory: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(directory))


def _keep(draft: Draft, error: OSError) -> NoReturn:
    """Give a complete draft that cannot have its name another one, and say so."""
    complete = draft.full if draft.full.exists() else draft.path
    if not complete.exists():
        raise error
    place = free_place(draft.output, draft.home)
    try:
        rename_new(complete, place)
    except OSError:
        raise error from None
    reason = "came to hold something else meanwhile" if error.errno in TAKEN else f"is refused ({error.strerror})"
    raise UserError(f"output '{draft.output}' {reason}: the finished run is kept in '{place}', move it") from None


def free_place(directory: Path, home: Path | None = None) -> Path:
    """A free name for what cannot be written to `directory`: `directory`.new, .new2, ...; in its parent or `home`."""
    home, number = home or directory.parent, 1
    while os.path.lexists(place := home / f"{directory.name}.new{number if number > 1 else ''}"):
        number += 1
    return place
