"""The exceptions a user can cause, each shown as one line: UserError with exit code 2, Interrupted with its own."""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 40


class UserError(ValueError):
    """Input that cannot be used: the message names the offending value and the remedy, in one line."""


class _Ending(Exception):
    """The end of a run that is no error of its own.

    Args:
        code: that the process exits with.
    """

    code: int

    def __init__(self, message: str, code: int | None = None):
        super().__init__(message)
        if code is not None:
            self.code = code


class Elsewhere(_Ending, UserError):
    """What ended another process of the run, which says it itself."""

    code = 2


class Interrupted(_Ending):
    """A run that was ended from outside but leaves something: the message says what."""

    code = 130


def nearest(word: str, known: list[str], cutoff: float = 0.5) -> str:
    """` (did you mean 'x'?)` for the known word closest to `word`, or "" if none is as close as `cutoff`."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f" (did you mean '{close[0]}'?)" if close else ""


def shown(value: Any) -> str:
    """A value for a message, as Python writes it but never long: nested and repeated parts become dots.

    Numbers of thousands of digits, which Python refuses to write out, are named by their size.
    """
    try:
        text = _SHORT.repr(value)
    except ValueError:
        text = f"a number of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    text = text if text.isprintable() else text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-30:]}"


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of any device is full; torch has no class for that of a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
