"""A library of levels: every block refitted at several widths, one file per block that appears whole or not at all.

Shapes: O outputs, C input channels of the dense consumer, K remaining ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from structprune.errors import UserError
from structprune.files import first_line, write_whole
from structprune.levels.grid import Grids
from structprune.models.adapter import UnitKey
from structprune.models.tensor_files import write_tensors
from structprune.refit.products import UNCHANGED
from structprune.structured.allocate import Counts
from structprune.structured.paths import RemovalPath

HEADER = "library.json"


@dataclass(frozen=True, eq=False)
class Level:
    """The consumer of one kind of unit after some removal steps."""

    weight: torch.Tensor  # (O, C), zero at removed inputs; with a constant feature (O, C + 1), its bias last
    damping: float  # infinity where the refit changed nothing
    error: float  # output error on held-out rows, relative to the power of the target output


@dataclass(frozen=True, eq=False)
class KindLevels:
    """The levels of one block and kind."""

    path: RemovalPath
    levels: dict[int, Level]  # removal steps -> level
    readers: dict[str, torch.Tensor]  # role -> refitted weight (O, C) of the linears before the units; may be empty


class Library:
    """The levels of a model's blocks in a directory.

    Args:
        directory: made where it is not there.
        identity: plain data that decides what is in it, beside grids and plan.
        grids, plan: the levels to make, and the plan to make them around, where nothing is there yet. Else those of
            what is there count, which need not be the same.
    Raises:
        UserError: the directory holds a library of another identity, is no library, or cannot be written.
    """

    def __init__(self, directory: Path, identity: dict, grids: Grids, plan: Counts):
        self.directory = directory
        self._files: dict[int, safe_open] = {}
        self._notes: dict[int, dict] = {}
        header = directory / HEADER
        identity = json.loads(json.dumps(identity))
        content = {"grids": plain_grids(grids), "plan": plain_counts(plan)} | identity
        if header.exists():
            content = check_identity(header, identity)
        elif directory.exists() and any(directory.iterdir()):
            raise UserError(f"'{directory}' is not empty and holds no library of levels: give another directory")
        else:
            try:
                write_whole(header, (json.dumps(content, indent=1) + "\n").encode())
            except OSError as error:
                raise UserError(f"'{directory}' cannot be written ({first_line(error)}): give another one") from error

        self.plan = counts_of(content["plan"])
        self.grids = grids_of(content["grids"])

    def has(self, index: int) -> bool:
        """Whether the levels of a block are there."""
        return self._path(index).exists()

    def write(self, index: int, kinds: dict[str, KindLevels]) -> None:
        """Keep the levels of a block: what a level keeps of its weight, in the dtype it has.

        Raises:
            UserError: the file cannot be written.
        """
        tensors, notes = {}, {}
        for kind, part in kinds.items():
            tensors[f"{kind}.steps"] = torch.tensor(part.path.steps)  # (steps, units per step)
            tensors[f"{kind}.cost"] = part.path.cost  # (steps,)
            tensors |= {f"{kind}.{role}": weight for role, weight in part.readers.items()}
            for steps, level in part.levels.items():
                columns = level.weight.abs().sum(0) > 0  # (C,)
                tensors |= {f"{kind}.{steps}": level.weight[:, columns], f"{kind}.{steps}.columns": columns}
            figures = {
                steps: [None if level.damping == UNCHANGED else level.damping, level.error]
                for steps, level in part.levels.items()
            }
            notes[kind] = {"levels": figures, "readers": list(part.readers)}
        write_tensors(self._path(index), tensors, {"notes": json.dumps(notes)})

    def path(self, key: UnitKey) -> RemovalPath:
        """The order in which the units of a block and kind go."""
        file = self._file(key[0])
        steps = tuple(map(tuple, file.get_tensor(f"{key[1]}.steps").tolist()))
        return RemovalPath(steps, file.get_tensor(f"{key[1]}.cost"))

    def weight(self, key: UnitKey, steps: int) -> torch.Tensor:
        """Of the consumer at a level, (O, C) or (O, C + 1), zero at removed inputs."""
        file = self._file(key[0])
        part, columns = (file.get_tensor(f"{key[1]}.{steps}{end}") for end in ("", ".columns"))  # (O, K), (C,)
        weight = part.new_zeros(len(part), len(columns))  # (O, C)
        weight[:, columns] = part
        return weight

    def readers(self, key: UnitKey) -> dict[str, torch.Tensor]:
        """Role -> refitted weight (O, C) of the linears before the units."""
        file = self._file(key[0])
        return {role: file.get_tensor(f"{key[1]}.{role}") for role in self._notes[key[0]][key[1]]["readers"]}

    def errors(self, key: UnitKey) -> dict[int, float]:
        """Removal steps -> relative output error on held-out rows."""
        self._file(key[0])
        return {int(steps): error for steps, (_, error) in self._notes[key[0]][key[1]]["levels"].items()}

    def _path(self, index: int) -> Path:
        return self.directory / f"block-{index:03d}.safetensors"

    def _file(self, index: int):
        if index not in self._files:
            path = self._path(index)
            try:
                self._files[index] = safe_open(path, "pt")
                self._notes[index] = json.loads(self._files[index].metadata()["notes"])
            except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
                self._files.pop(index, None)
                raise UserError(f"{path} cannot be read ({first_line(error)}): delete it to make it anew") from error
        return self._files[index]


def check_identity(header: Path, identity: dict) -> dict:
    """The header of a library; UserError unless it has all of `identity`, naming the first key that differs."""
    try:
        before = json.loads(header.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{header} cannot be read ({first_line(error)}): delete '{header.parent}'") from error
    if keys := sorted(key for key in identity if before.get(key) != identity[key]):
        raise UserError(
            f"the levels in '{header.parent}' were made with another {keys[0]}: give another directory, or delete it"
        )
    if not all(isinstance(before.get(name), dict) for name in ("grids", "plan")):
        raise UserError(f"{header} lacks its grids or its plan: delete '{header.parent}'")
    return before


def plain_grids(grids: Grids) -> dict[str, list[int]]:
    """As plain data, for an identity."""
    return {f"{index} {kind}": list(steps) for (index, kind), steps in grids.items()}


def grids_of(plain: dict[str, list[int]]) -> Grids:
    """The grids of `plain_grids`."""
    return {(int(name.split()[0]), name.split()[1]): tuple(steps) for name, steps in plain.items()}


def plain_counts(counts: Counts) -> dict[str, int]:
    """As plain data; `counts_of` reads it."""
    return {f"{index} {kind}": steps for (index, kind), steps in counts.items()}


def counts_of(plain: dict[str, int]) -> Counts:
    """The counts of `plain_counts`."""
    return {(int(name.split()[0]), name.split()[1]): steps for name, steps in plain.items()}
