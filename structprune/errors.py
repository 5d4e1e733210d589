"""The exceptions a user can cause, each shown as a single line: UserError with exit code 2, Interrupted with 130."""


class UserError(ValueError):
    """Input that cannot be used: the message names the offending value and the remedy, in one line."""


class Interrupted(Exception):
    """A run that was ended from outside but leaves something: the message says what."""


def nearest(word: str, known: list[str], cutoff: float = 0.5) -> str:
    """` (did you mean 'x'?)` for the known word closest to `word`, or "" if none is as close as `cutoff`."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f" (did you mean '{close[0]}'?)" if close else ""
