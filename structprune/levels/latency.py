"""What every width costs in milliseconds, by a table of measured times, and what a plan takes: the sum over its parts.

`structprune.bench.part_latency` measures; everything here is arithmetic on plain numbers.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from structprune.levels.grid import clipped
from structprune.models.adapter import UnitKey
from structprune.structured.allocate import Counts, most_channels
from structprune.structured.sizes import BlockSize

POINTS = 9  # widths of a part that are measured, at most, from the whole one to the narrowest


@dataclass(frozen=True)
class PartTimes:
    """Times of the attention or the MLP of some blocks of equal shapes.

    Attributes:
        kind: `attention` or `channels`. blocks: their indices.
        steps: removal steps that take the whole part, which costs nothing then.
        removed: removal steps that were measured, ascending from 0.
        ms: of one part at each of them; never rising.
    """

    kind: str
    blocks: tuple[int, ...]
    steps: int
    removed: tuple[int, ...]
    ms: tuple[float, ...]

    def at(self, steps: int) -> float:
        """Milliseconds of a part after some removal steps: linear between measured ones."""
        return 0.0 if steps >= self.steps else float(np.interp(steps, self.removed, self.ms))


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of a forward pass by its parts.

    Attributes:
        dense: of the whole dense model. rest: of what no plan changes (embedding, last norm, LM head).
        scale: the factor by which times of parts alone were multiplied, so that they add up to `dense`.
        identity: what was measured, where and how, as plain data.
    """

    dense: float
    rest: float
    scale: float
    parts: tuple[PartTimes, ...]
    identity: dict

    @cached_property
    def _by_key(self) -> dict[UnitKey, PartTimes]:
        return {(index, part.kind): part for part in self.parts for index in part.blocks}

    def price(self, key: UnitKey, steps: int) -> float:
        """Milliseconds of what is left of a block's attention or MLP (a `Price`)."""
        return self._by_key[key].at(steps)

    def total(self, counts: Counts) -> float:
        """Predicted milliseconds of the model that a plan leaves; parts without a count stay whole."""
        return self.rest + sum(part.at(counts.get(key, 0)) for key, part in self._by_key.items())

    def plain(self) -> dict:
        """As plain data; `table_of` reads it."""
        return asdict(self)

    def digest(self) -> str:
        """SHA-256 (first 16 hex digits) of its figures."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:16]


def table_of(plain: dict) -> LatencyTable:
    """The table of `LatencyTable.plain`.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    parts = []
    for part in plain["parts"]:
        lists = {name: tuple(part[name]) for name in ("blocks", "removed", "ms")}
        if not len(lists["removed"]) == len(lists["ms"]) > 0:
            raise ValueError("a part has other numbers of widths and times")
        parts.append(PartTimes(kind=part["kind"], steps=int(part["steps"]), **lists))
    figures = {name: float(plain[name]) for name in ("dense", "rest", "scale")}
    return LatencyTable(**figures, parts=tuple(parts), identity=dict(plain["identity"]))


@dataclass(frozen=True)
class LatencyTarget:
    """The most milliseconds that a pruned model may take, by a table."""

    ms: float
    table: LatencyTable

    def met(self, counts: Counts) -> bool:
        """Whether a plan's predicted time is within the target, roundings of sums aside."""
        return self.table.total(counts) <= self.ms * (1 + 1e-9)

    def budget(self, keys: Iterable[UnitKey]) -> float:
        """Milliseconds that the parts `keys` may take together: the target without everything else."""
        keys = list(keys)
        return self.ms - self.table.total({}) + sum(self.table.price(key, 0) for key in keys)


def never_rising(values: Sequence[float]) -> list[float]:
    """The nearest values in least squares that never rise: neighbours that do become their mean, until none does."""
    groups: list[tuple[float, int]] = []  # mean and number of the values that it replaces
    for value in values:
        mean, count = value, 1
        while groups and groups[-1][0] < mean:
            before, others = groups.pop()
            mean, count = (before * others + mean * count) / (others + count), others + count
        groups.append((mean, count))
    return [mean for mean, count in groups for _ in range(count)]


def make_table(
    dense: float, rest: float, times: Mapping[tuple[str, tuple[int, ...], int], Mapping[int, float]], identity: dict
) -> LatencyTable:
    """A table from measured milliseconds.

    Parts that are timed alone add up to another time than the model takes: they begin with a pause and their weights
    may stay in a cache. So all of them are scaled alike, such that the dense model's time is met.

    Args:
        dense: of the whole model; above `rest`, that of what no plan changes.
        times: (kind, blocks, removal steps of the whole part) -> removal steps, 0 among them -> one part's time.
    """
    smooth = {}
    for key, measured in times.items():
        removed = sorted(measured)
        smooth[key] = dict(zip(removed, never_rising([measured[steps] for steps in removed])))
    scale = (dense - rest) / sum(len(key[1]) * points[0] for key, points in smooth.items())
    parts = tuple(
        PartTimes(kind, blocks, steps, tuple(points), tuple(scale * ms for ms in points.values()))
        for (kind, blocks, steps), points in smooth.items()
    )
    return LatencyTable(dense, rest, scale, parts, identity)


def measured_steps(size: BlockSize, kind: str, multiple: int) -> tuple[int, ...]:
    """Removal steps to measure a part at: evenly from none to one step of attention, or `multiple` channels, left."""
    steps, unit = size.steps[kind], multiple if kind == "channels" else 1
    most = most_channels(size, multiple) if kind == "channels" else steps - 1
    last = min(most, POINTS - 1)
    return tuple(sorted({clipped(round(most * n / max(1, last)), most, steps, unit) for n in range(last + 1)}))


def narrowest(sizes: list[BlockSize], multiple: int) -> Counts:
    """The counts of the narrowest plan of a ranking: an attention step and `multiple` channels left everywhere."""
    return {(size.index, kind): measured_steps(size, kind, multiple)[-1] for size in sizes for kind in size.steps}
