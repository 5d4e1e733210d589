"""Hidden drafts of outputs, each locked by the run that writes it, so that those of killed runs are known and go.

A run that writes `out` holds, beside it,

    .out.<token>.lock     locked while the run lives; the system unlocks it at a kill
    .out.<token>.draft    what is being written; after an exchange, what was replaced
    .out.<token>.old      what is replaced, between two renames, where the system has no exchange
    .out.<token>.full     a whole draft whose entries are being moved into a directory that cannot be replaced
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from structprune.checkpoint.swap import rename_new, signals_wait

LAST = ("config.json", "demo.json", "bench.json", "sinks.json")  # an output without its own one is not read as whole


@dataclass(frozen=True)
class Draft:
    """The hidden names of one run that writes `output`, all of them in the directory `home`."""

    output: Path
    home: Path
    token: str

    def _named(self, kind: str) -> Path:
        return self.home / f".{self.output.name}.{self.token}.{kind}"

    @property
    def path(self) -> Path:
        """The directory to write into."""
        return self._named("draft")

    @property
    def old(self) -> Path:
        """What is being replaced."""
        return self._named("old")

    @property
    def full(self) -> Path:
        """A whole draft that is being moved in."""
        return self._named("full")

    @property
    def lock(self) -> Path:
        """The file that a living run has locked."""
        return self._named("lock")

    def move_in(self) -> None:
        """Move the entries of `full` into the output, the file that makes it whole last.

        Raises:
            FileExistsError: one of them is there.
        """
        for entry in sorted(self.full.iterdir(), key=lambda entry: (entry.name in LAST, entry.name)):
            rename_new(entry, self.output / entry.name)
        self.full.rmdir()

    def settle(self) -> None:
        """End what a run began, in whichever state; call it with the lock held."""
        if self.full.exists():
            self.move_in()
        if os.path.lexists(self.old):
            if not os.path.lexists(self.output):
                rename_new(self.old, self.output)
            elif os.path.lexists(self.path):
                return  # the output was made by somebody else since, and `old` may be the only copy of what was there
            else:
                _remove(self.old)
        _remove(self.path)
        self.lock.unlink(missing_ok=True)


@contextmanager
def new_draft(output: Path, home: Path) -> Iterator[Draft]:
    """Names in `home` for a run that writes `output`, with an empty directory to write into; settled at the end."""
    draft, handle = _claim(output, home)
    try:
        draft.path.mkdir(0o700)
        yield draft
    finally:
        with signals_wait():
            try:
                draft.settle()
            finally:
                os.close(handle)


def _claim(output: Path, home: Path) -> tuple[Draft, int]:
    """Fresh names, and the handle whose closing unlocks them."""
    while True:
        draft = Draft(output, home, secrets.token_hex(4))
        handle = os.open(draft.lock, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        with suppress(OSError):  # a file system without locks: there nothing is cleaned up
            fcntl.flock(handle, fcntl.LOCK_EX)
        if draft.lock.exists():  # else a clean-up came between the two lines above
            return draft, handle
        os.close(handle)


def clean_up(output: Path) -> None:
    """Settle what killed runs that wrote `output` have left, beside it and in it; living runs are left alone."""
    for home in (output.parent, output):
        with suppress(OSError):
            for path in list(home.iterdir()):
                if match := re.fullmatch(rf"\.{re.escape(output.name)}\.([0-9a-f]{{8}})\.lock", path.name):
                    _settle_dead(Draft(output, home, match[1]))


def _settle_dead(draft: Draft) -> None:
    with suppress(OSError), signals_wait():  # among them BlockingIOError, where the run lives
        handle = os.open(draft.lock, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.settle()
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_symlink():  # the output was a link; what it points to stays
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
