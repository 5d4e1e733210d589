"""The losses that a search measured, in a file beside its library."""

import json
from collections.abc import Callable
from pathlib import Path

from structprune.errors import UserError
from structprune.files import first_line, write_whole

LOSSES = "search.json"
CONTENT = {"identity": dict, "losses": dict, "generations": list}  # of that file


class LossFile:
    """Losses that were measured in a round, kept in a file so that an interrupted search measures none twice.

    Args:
        identity: plain data that decides them.
        writes: false in processes that keep the losses of their own run only.
    Raises:
        UserError: the file cannot be read, or holds losses of another identity.
    """

    def __init__(self, path: Path, identity: dict, writes: bool = True):
        self._path, self._identity, self._writes = path, json.loads(json.dumps(identity)), writes
        self._losses: dict[str, float] = {}
        self.generations: list[dict] = []
        if path.exists():
            check_losses(path, self._identity)
            content = _read_losses(path)
            self._losses, self.generations = dict(content["losses"]), list(content["generations"])

    def value(self, name: str, measure: Callable[[], float]) -> float:
        """The loss of that name, measured now if it was not."""
        if name not in self._losses:
            self._losses[name] = measure()
            self._write()
        return self._losses[name]

    def add_generation(self, result: dict) -> None:
        """Keep the best plan after a generation, and its loss."""
        self.generations.append(result)
        self._write()

    def _write(self) -> None:
        if not self._writes:
            return
        content = {"identity": self._identity, "losses": self._losses, "generations": self.generations}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(content).encode())


def check_losses(path: Path, identity: dict) -> None:
    """Raise UserError unless a file of losses has all of `identity`, naming the first key that differs."""
    before = _read_losses(path)["identity"]
    if keys := sorted(key for key, value in json.loads(json.dumps(identity)).items() if before.get(key) != value):
        raise UserError(
            f"the losses in '{path}' were measured with another {keys[0]}: delete the file, or give another directory"
        )


def _read_losses(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: kind(content[name]) for name, kind in CONTENT.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): delete it to search anew") from error
