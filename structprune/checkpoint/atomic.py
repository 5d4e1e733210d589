"""Output directories that appear complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_directory(directory: str | Path) -> Iterator[Path]:
    """Yields a draft beside `directory` to write into. It is renamed into place at the end, or removed after an error.

    An earlier `directory` is replaced only once the draft is complete, and restored if the rename fails.
    """
    directory = Path(directory).absolute()
    new_parents = [folder for folder in directory.parents if not folder.exists()]  # innermost first
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield draft
        _open_up(draft)
        _swap(draft, directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if not directory.exists():
            with suppress(OSError):  # another process may use it by now
                for folder in new_parents:
                    folder.rmdir()


def _open_up(draft: Path) -> None:
    """Give files the usual modes: those of mkdtemp and safetensors are private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (draft, *draft.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _swap(draft: Path, directory: Path) -> None:
    backup = draft.with_name(f"{draft.name}.old")  # the draft's name is unique
    try:
        if directory.exists():
            os.rename(directory, backup)
        os.rename(draft, directory)
    except BaseException:
        if os.path.lexists(backup) and not directory.exists():
            os.rename(backup, directory)
        raise
    finally:
        if backup.is_symlink() and directory.exists():  # the output was a link; what it points to stays
            backup.unlink()
        elif directory.exists():  # else the backup is all there is
            shutil.rmtree(backup, ignore_errors=True)
