"""Names of checkpoints and tasks, for tables and for files."""

import re
from collections.abc import Sequence
from pathlib import Path

from structprune.errors import UserError

LONGEST = 100  # characters of a file's name


def checkpoint_labels(checkpoints: Sequence[str]) -> list[str]:
    """A name for each checkpoint: the last part of its path or Hub id, with as many parents as are needed to differ.

    Raises:
        UserError: a checkpoint is given twice.
    """
    parts: list[tuple[str, ...]] = []
    for name in checkpoints:
        own = (Path(name).resolve() if Path(name).exists() else Path(name)).parts
        if own in parts:
            raise UserError(f"checkpoint '{name}' is given twice: give it once")
        parts.append(own)
    deepest = max(map(len, parts), default=1)
    labels = []
    for own in parts:
        others = [other for other in parts if other is not own]
        depth = next(
            (d for d in range(1, deepest) if all(_tail(own, d) != _tail(other, d) for other in others)), deepest
        )
        labels.append("-".join(part.strip("/") for part in own[-depth:]).strip("-"))
    return _unique(labels)


def safe_names(names: Sequence[str]) -> dict[str, str]:
    """Name -> a file name; different names have different ones."""
    return dict(zip(names, _unique(names), strict=True))


def _tail(parts: tuple[str, ...], depth: int) -> list[str]:
    return [part.lower() for part in parts[-depth:]]


def _unique(names: Sequence[str]) -> list[str]:
    """Labels of letters, digits and ._- only, numbered where they are equal but for upper and lower case."""
    labels: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")[:LONGEST] or "unnamed"
        others, label, number = {each.lower() for each in labels}, plain, 2
        while label.lower() in others:
            label, number = f"{plain}-{number}", number + 1
        labels.append(label)
    return labels
