"""Finished parts of a long run, each in a file of its own: a run that was killed reads them when it is repeated."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from structprune.files import full_disk_errors
from structprune.models.tensor_files import write_tensors

NOTES = "notes"


def unwatched() -> None:
    """The watcher that never stops a run."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What was kept of one part: tensors on CPU, and plain data."""

    tensors: dict[str, torch.Tensor]
    notes: Any


@dataclass(frozen=True)
class Journal:
    """Parts in a directory, or nowhere.

    Attributes:
        directory: made with the first part; None: nothing is kept.
        watch: called after every part, and between the steps of others; what it raises ends the run.
    """

    directory: Path | None = None
    watch: Callable[[], None] = field(default=unwatched, compare=False)

    def within(self, *names: str) -> "Journal":
        """The journal of a stage, in a directory of its own."""
        return self if self.directory is None else Journal(self.directory.joinpath(*names), self.watch)

    def has(self, name: str) -> bool:
        """Whether a part was kept whole; its tensors are not read."""
        if self.directory is None:
            return False
        try:
            with safe_open(self._path(name), framework="pt") as file:  # which refuses a file that ends too early
                return NOTES in file.metadata()
        except (OSError, SafetensorError, TypeError):
            return False

    def read(self, name: str) -> Entry | None:
        """A part; None where it was not finished, or its file is damaged."""
        if self.directory is None:
            return None
        try:
            with safe_open(self._path(name), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
                return Entry(tensors, json.loads(file.metadata()[NOTES]))
        except (OSError, SafetensorError, LookupError, TypeError, ValueError):
            return None

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor] | None = None, notes: Any = None) -> None:
        """Keep a part, whole or not at all.

        Raises:
            UserError: its file cannot be written.
        """
        if self.directory is not None:
            with full_disk_errors(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                write_tensors(self._path(name), dict(tensors or {}), {NOTES: json.dumps(notes)})
        self.watch()

    def mark(self, stage: str, name: str, notes: Any) -> None:
        """Keep a part of a stage that is no step of the run: what its end comes to is not watched."""
        if self.directory is not None:
            Journal(self.directory / stage).keep(name, notes=notes)

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}.safetensors"


NOWHERE = Journal()
