"""`structprune prune --work --resume`: its options, and how a run is ended where nothing is lost."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from structprune.cli.options import without_dots
from structprune.errors import Interrupted, UserError

if TYPE_CHECKING:
    from structprune.runs.work import Work

WorkPlace = Annotated[
    Path | None,
    typer.Option(
        "--work",
        callback=without_dots,
        help="Directory for finished parts of the run, from which the same command goes on after a kill. One that is"
        " named stays, for other ratios, scores and export classes.",
        show_default="OUT.work, which goes at the end",
    ),
]
ResumeMode = Annotated[
    str,
    typer.Option(
        "--resume",
        metavar="MODE",
        help="auto: go on from finished parts, if there are any; required: refuse to begin; never: begin anew.",
    ),
]
HALT = 128  # plus the signal's number: the shell's code for a process that a signal ended


class Stopper:
    """Ends a run after the part that is under way; a second signal ends it at once.

    Args:
        kept: says what the run has kept by then, and how to go on; nothing where nothing is.
    """

    def __init__(self, kept: Callable[[], str]):
        self.kept, self.number = kept, 0

    def handle(self, number: int, _: FrameType | None) -> None:
        """The handler of a signal."""
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if sys.stderr.isatty():  # else nobody is there to send another
            print("structprune: ends after the part under way; once more ends it now", file=sys.stderr, flush=True)

    def watch(self) -> None:
        """End the run if a signal came."""
        if self.number:
            raise self.interrupted()

    def interrupted(self, note: str = "") -> Interrupted:
        """What the run says when it is ended: the note, or what is kept."""
        return Interrupted(note or self.kept() or "nothing was written", HALT + (self.number or signal.SIGINT))


@contextmanager
def stopping(kept: Callable[[], str], outputs: Callable[[], Iterable[Path]]) -> Iterator[Stopper]:
    """While open, Ctrl-C and SIGTERM end a run that calls `watch` after the part under way.

    Args:
        kept: as `Stopper`. outputs: of the run, which are complete at the end.
    """
    stopper, before = Stopper(kept), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # a job in the background keeps what it ignores
                before[number] = signal.signal(number, stopper.handle)
    try:
        yield stopper
    except KeyboardInterrupt as error:
        if stopper.number or kept():  # else it is another signal's
            raise stopper.interrupted() from error
        raise
    else:
        if stopper.number:
            names = ", ".join(f"'{out}'" for out in outputs())
            raise stopper.interrupted(f"{names} was complete by then")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stoppable(work: "Work", outputs: Iterable[Path]) -> Iterator["Work"]:
    """The work of a run that Ctrl-C and SIGTERM end after the part under way, while open.

    Args:
        outputs: that it writes.
    """
    from dataclasses import replace

    from structprune.runs.work import has_parts

    def kept() -> str:
        if not has_parts(work.directory):
            return ""
        same = "the same command goes on" if work.resume != "never" else f"without {work.restart} it goes on"
        return f"finished parts are kept in {work.directory}: {same}"

    with stopping(kept, lambda: outputs) as stopper:
        yield replace(work, watch=stopper.watch)


def work_of(out: Path, place: Path | None, levels: Path | None, resume: str) -> "Work":
    """The work of a run, by its options; the run refuses an unknown mode."""
    from typing import cast

    from structprune.runs.work import Resume, Work, work_beside

    return Work(place or work_beside(out), levels, cast(Resume, resume), stays=place is not None)


def taken_from(work: "Work") -> list[str]:
    """The line that says what a run took from finished parts; none where it took nothing."""
    return [f"Taken from finished parts: {', '.join(sorted(work.taken))}"] if work.taken else []


def check_alone(place: Path | None, resume: str, recovers: bool) -> None:
    """Raise UserError for options of work beside --recover, which keeps its own."""
    if recovers and (place is not None or resume != "auto"):
        option = f"--work {place}" if place is not None else f"--resume {resume}"
        raise UserError(f"--recover keeps what it has finished beside its outputs: leave out {option}")
