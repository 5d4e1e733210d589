"""Progress bars and printed lines."""

import io

from rich.console import Console

from structprune.cli.console import progress_bars, show


def test_bars_pass_items_on_and_count_iterators():
    stream = io.StringIO()
    with progress_bars(Console(file=stream, force_terminal=True, width=100)) as track:
        assert stream.getvalue() == ""  # an error before the first bar stays a single line
        assert list(track((number for number in range(3)), "numbers")) == [0, 1, 2]
        assert list(track({"a": 1}, "keys")) == ["a"]
    assert "numbers" in stream.getvalue() and "0/3" in stream.getvalue()


def test_lines_are_not_wrapped():
    stream = io.StringIO()
    show("x" * 50, console=Console(file=stream, width=20))
    assert stream.getvalue() == "x" * 50 + "\n"
