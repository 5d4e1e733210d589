"""Renames that lose nothing: onto a free name, or of two directories at once; and signals that wait for them."""

import ctypes
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

HERE = -100  # AT_FDCWD: relative paths are those of the current directory
FLAGS = {"linux": (1, 2), "darwin": (4, 2)}  # onto a free name only, exchange: of renameat2 and of renamex_np
UNKNOWN = (
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EPERM,
)  # not of this file system or system
WAITING = ("SIGINT", "SIGTERM", "SIGHUP")


def rename_new(source: Path, target: Path) -> None:
    """Rename onto a name that must be free.

    Raises:
        FileExistsError: it is not.
    """
    if _rename_at_once(source, target, exchange=False):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def exchange(one: Path, other: Path, spare: Path) -> None:
    """Exchange two directories, in one step where the system can, else by way of the name `spare` for `other`.

    Raises:
        OSError: nothing has changed; or, where even the way back is blocked, `other` lies at `spare`.
    """
    if _rename_at_once(one, other, exchange=True):
        return
    os.rename(other, spare)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(spare, other)
        raise
    os.rename(spare, one)


def _rename_at_once(source: Path, target: Path, exchange: bool) -> bool:
    """Rename by a call that Python's os lacks; False where the system or the file system lacks it too."""
    call = _system_call()
    if call is None:
        return False
    sys.audit("os.rename", source, target, -1, -1)  # as os.rename does
    if call(os.fsencode(source), os.fsencode(target), FLAGS[sys.platform][exchange]) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@lru_cache
def _system_call() -> Callable[[bytes, bytes, int], int] | None:
    """source, target, flags -> 0, or -1 with the reason in errno."""
    if sys.platform not in FLAGS:
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        return lambda source, target, flags: library.renameat2(HERE, source, HERE, target, flags)
    return getattr(library, "renamex_np", None)


@contextmanager
def signals_wait() -> Iterator[None]:
    """While open, a signal that would end the run waits; it is sent again at the end.

    Handlers are replaced rather than signals blocked, because those that are blocked here reach another thread.
    """
    handlers: dict[int, Callable | int] = {}
    received: list[int] = []
    try:
        if threading.current_thread() is threading.main_thread():  # the only one that may, and that handlers run in
            for number in (getattr(signal, name) for name in WAITING if hasattr(signal, name)):
                handler = signal.getsignal(number)
                if handler is not None and handler is not signal.SIG_IGN:
                    handlers[number] = handler
                    signal.signal(number, lambda number, frame: received.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received[:1]:
            signal.raise_signal(number)
