"""Names of checkpoints and tasks, for people and for files."""

import re
from pathlib import Path
from typing import Sequence

from structprune.errors import UserError

LONGEST = 100  # characters of a file's name


def checkpoint_labels(checkpoints: Sequence[str]) -> list[str]:
    """A name for each checkpoint: the last part of its path or Hub id, with as many parents as tell them apart.

    Raises:
        UserError: a checkpoint is given twice.
    """
    parts: list[tuple[str, ...]] = []
    for name in checkpoints:
        own = (Path(name).resolve() if Path(name).exists() else Path(name)).parts
        if own in parts:
            raise UserError(f"checkpoint '{name}' is given twice")
        parts.append(own)
    deepest = max(map(len, parts), default=1)
    shown = []
    for own in parts:
        others = [other for other in parts if other is not own]
        depth = next(
            (d for d in range(1, deepest) if all(_tail(own, d) != _tail(other, d) for other in others)), deepest
        )
        shown.append("-".join(part.strip("/") for part in own[-depth:]).strip("-"))
    return _unique(shown)


def safe_names(names: Sequence[str]) -> dict[str, str]:
    """Name -> a file name of its own."""
    return dict(zip(names, _unique(names)))


def _tail(parts: tuple[str, ...], depth: int) -> list[str]:
    return [part.lower() for part in parts[-depth:]]


def _unique(names: Sequence[str]) -> list[str]:
    """Letters, digits and ._- only, told apart by a number also where upper and lower case are one."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")[:LONGEST] or "unnamed"
        taken, label, number = {each.lower() for each in found}, plain, 2
        while label.lower() in taken:
            label, number = f"{plain}-{number}", number + 1
        found.append(label)
    return found
