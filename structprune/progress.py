"""The progress hook that long work takes, so that drivers need no console."""

from collections.abc import Callable, Iterable

Title = str | Callable[[], str]  # a function is asked again after every item
Track = Callable[[Iterable, Title], Iterable]  # `track(items, title)` wraps an iteration


def watched(track: Track, watch: Callable[[], None]) -> Track:
    """A hook that also calls `watch` after every item, where what it raises loses nothing."""

    def tracked(items: Iterable, title: Title) -> Iterable:
        for item in track(items, title):
            yield item
            watch()

    return tracked


def untracked(items: Iterable, title: Title) -> Iterable:
    """The hook that shows nothing."""
    return items
