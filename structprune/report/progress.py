"""Progress bars with the time left, as the `track(items, title)` that pipelines take."""

from contextlib import contextmanager
from typing import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[Iterable, str], Iterable]]:
    """While open, the yielded `track(items, title)` shows a bar for each iteration it wraps; a bar goes when done.

    Nothing is shown before the first one, so that what is refused at once is refused in one line.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True)

    def track(items: Iterable, title: str) -> Iterable:
        items = items if hasattr(items, "__len__") else list(items)
        progress.start()  # at most once
        task = progress.add_task(title, total=len(items))
        try:
            for item in items:
                yield item
                progress.advance(task)
        finally:
            progress.remove_task(task)

    try:
        yield track
    finally:
        if progress.live.is_started:
            progress.stop()
