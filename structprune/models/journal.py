"""Finished parts of a long run, each in a file of its own: a run that was killed reads them when it is repeated."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from structprune.errors import Interrupted
from structprune.files import full_disk_errors
from structprune.models.headers import read_header
from structprune.models.maps import map_shard, place_of
from structprune.models.tensor_files import write_tensors
from structprune.workers import ALONE, Workers

NOTES = "notes"
MEANINGS = {  # how names of parts, or of their stages, begin -> what users know them as
    "scores": "scores", "refits": "refits", "masks": "masks", "reverse": "generated windows", "drops": "losses",
    "dense": "losses", "plain": "losses", "refitted": "losses", "masked": "losses", "candidate": "losses",
    "mass": "attention mass", "pass": "sums of a pass", "certainties": "row weights", "gradients": "row weights",
}  # fmt: skip


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

    Of several processes the first one reads and writes, so that all of them see the same parts: each asks for the same
    ones in the same order.

    Attributes:
        directory: made with the first part; None: nothing is kept.
        watch: called after every part; what it raises ends the run. Of a single process also between other steps.
        stage: the first of the names that led here.
        made: the places of this run's own parts. taken: what was read of others, in words of `MEANINGS`. The journals
            of all stages share both.
    """

    directory: Path | None = None
    watch: Callable[[], None] = field(default=unwatched, compare=False)
    workers: Workers = ALONE
    stage: str = ""
    made: set[Path] = field(default_factory=set, compare=False)
    taken: set[str] = field(default_factory=set, compare=False)

    def within(self, *names: str) -> "Journal":
        """The journal of a stage, in a directory of its own."""
        stage = self.stage or names[0]
        return self if self.directory is None else replace(self, directory=self.directory.joinpath(*names), stage=stage)

    def has(self, name: str) -> bool:
        """Whether a part was kept whole; its tensors are not read."""
        return self.directory is not None and self.workers.from_first(lambda: self._has(name))

    def _has(self, name: str) -> bool:
        try:
            with safe_open(self._path(name), framework="pt") as file:  # which refuses a file that ends too early
                return NOTES in file.metadata()
        except (OSError, SafetensorError, TypeError):
            return False

    def read(self, name: str) -> Entry | None:
        """A part; None where it was not finished, or its file is damaged."""
        if self.directory is None:
            return None
        entry = self.workers.from_first(lambda: self._read(name))
        meaning = MEANINGS.get(self.stage or name.partition("-")[0])
        if entry is not None and meaning is not None:
            self.note_taken(meaning, self._path(name))
        return entry

    def note_taken(self, meaning: str, place: Path) -> None:
        """Remember that something was taken from a place, unless this run made it."""
        if self.directory is not None and place not in self.made:
            self.taken.add(meaning)

    def note_made(self, place: Path) -> None:
        """Remember that this run writes a place, a part's file or a directory of levels."""
        if self.directory is not None:
            self.made.add(place)

    def _read(self, name: str) -> Entry | None:
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
            self.note_made(self._path(name))
            self.workers.first(lambda: self._write(name, dict(tensors or {}), notes))
        self.watch_all()

    def _write(self, name: str, tensors: dict[str, torch.Tensor], notes: Any) -> None:
        assert self.directory is not None
        with full_disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(name), tensors, {NOTES: json.dumps(notes)})

    def watch_all(self) -> None:
        """`watch` in every process; where it ends one, it ends all, at the same part."""
        reason = None
        try:
            self.watch()
        except Interrupted as error:
            reason = error
        reasons = [each for each in self.workers.gather(reason) if each is not None]
        if reasons:
            raise reason or reasons[0]

    def mark(self, stage: str, name: str, notes: Any) -> None:
        """Keep a part of a stage that is no step of the run: what its end comes to is not watched."""
        if self.directory is not None:
            Journal(self.directory / stage, workers=self.workers).keep(name, notes=notes)

    def map_weights(self, name: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Let weights that stay on disk lie in the file of the part that was kept of them, and in no other.

        Args:
            weights: by their names in the part, with its values.
        """
        if self.directory is None or self.workers.several:
            return
        headers = read_header(self._path(name))
        for key, weight in weights.items():
            if (place := place_of(weight)) and place.dtype:
                weight.data = map_shard(self._path(name), {key: headers[key]}, place.dtype)[key]

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}.safetensors"


NOWHERE = Journal()
