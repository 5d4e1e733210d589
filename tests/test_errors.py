"""Values in messages: as Python writes them, but short, printable, and always possible."""

import pytest

from structprune.errors import shown

CASES = {
    "number": (4.0, "4.0"),
    "text": ("four", "'four'"),
    "list": ([1, "a", None], "[1, 'a', None]"),
    "nested": ({"a": [[[1]]]}, "{'a': [[...]]}"),
    "digits": (10**5000, "a number of 16,610 bits"),
    "half a pair": ("\ud800", "'\\ud800'"),
    "control": ("a\nb\x1b[31m", "'a\\nb\\x1b[31m'"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_value_as_text(name):
    value, text = CASES[name]
    assert shown(value) == text


def test_a_large_value_is_short():
    itself: list = []
    itself.append(itself)
    for value in ("x" * 10**6, list(range(10**6)), itself, [["x" * 500] * 500] * 500, {"a": b"x" * 10**6}):
        assert len(shown(value)) <= 120
