"""Values of options of a generation: each check raises a UserError that names the option and what it may be."""

import math

from structprune.errors import UserError, nearest, shown

MOST = 1 << 20  # steps or tokens of a generation


def check_whole(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
            raise UserError(f"{name} = {shown(value)} cannot be used: give a whole number from 1 to {MOST}")


def check_share(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise UserError(f"{name} = {shown(value)} cannot be used: give a number above 0, up to 1")


def check_not_negative(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise UserError(f"{name} = {shown(value)} cannot be used: give 0 (off) or more")


def check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        close = nearest(str(value)[:80], list(known))
        raise UserError(f"unknown {name} {shown(value)}{close}: choose one of {', '.join(known)}")
