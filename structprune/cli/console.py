"""What verbs share to talk to the user: progress bars on stderr, tables and lines on stdout."""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from structprune.progress import Title, Track

if TYPE_CHECKING:
    from structprune.workers import Workers


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Track]:
    """Yields `track(items, title)`, which shows a bar with the time left while its items are iterated.

    Nothing is shown before the first bar, so that an error found at once is a single line.

    Args:
        console: default stderr.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = console or Console(stderr=True)
    progress = Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True,
        disable=not console.is_interactive,  # in a log bars would leave empty lines, beside the one line of an error
    )  # fmt: skip

    def track(items: Iterable, title: Title) -> Iterable:
        items = items if isinstance(items, Collection) else list(items)
        progress.start()  # does nothing when it is running already
        task = progress.add_task(_words(title), total=len(items))
        try:
            for item in items:
                yield item
                progress.update(task, advance=1, description=_words(title))
        finally:
            progress.remove_task(task)

    try:
        yield track
    finally:
        if progress.live.is_started:
            progress.stop()


def progress_of(workers: "Workers"):
    """`progress_bars` of a run that several processes share, shown by the first one."""
    return progress_bars(Console(stderr=True, quiet=not workers.main))


def warner(shown: bool) -> Callable[[str], None]:
    """A function that writes a line of warning to stderr; where not `shown`, as of processes behind the first, none."""

    def warn(line: str) -> None:
        if shown:
            print(f"structprune: warning: {line}", file=sys.stderr)

    return warn


def _words(title: Title) -> str:
    return title() if callable(title) else title


def show(*parts: RenderableType, console: Console | None = None, shown: bool = True) -> None:
    """Print tables and lines of text; lines are not wrapped, so that paths in them can be copied.

    Args:
        console: default stdout.
        shown: false in processes behind the first, which print nothing.
    """
    console = console or Console()
    for part in parts if shown else ():
        console.print(part, soft_wrap=isinstance(part, str))
