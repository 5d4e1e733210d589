"""Measurements over a trajectory, and how they are assembled from single forward passes.

Shapes: N sequences, S steps, T positions, B sequences of a forward pass, L layers, H heads of one of them.
"""

from dataclasses import dataclass

import torch

from structprune.sinks.diagnostics import head_sinks, per_query
from structprune.workers import Workers

UNSEEN = 8  # the last positions of a causal model are visible to fewer queries than this, too few for a mean


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Attention mass of N sequences over S steps, on CPU.

    Attributes:
        kind: "forward" (noise levels) or "reverse" (the model's own generation).
        causal: mass is counted per query that can see a position (`per_query`).
        prompt: positions 0..prompt-1 hold the same token at every step of a generation; 0 for noise levels.
        progress: (N, S) share of the text that is visible (1 - p of a noise level), or of the generation that is done.
        ids: (N, S, T) int64, the model's input.
        present: (S, T) bool, the positions that can be compared at a step: all, or for a causal model those that exist
            and that at least `UNSEEN` queries can see.
        mass: (N, S, T) fp32 over all layers and heads, NaN where not present.
        votes: (N, S, T) share of heads for which the position is a sink (`head_sinks`), NaN where not present.
        strength: per layer (H,) share of a head's attention that goes to its sinks, mean over sequences and steps.
        sinks: per layer (H,) number of sinks of a head, mean over sequences and steps.
    """

    kind: str
    causal: bool
    prompt: int
    progress: torch.Tensor
    ids: torch.Tensor
    present: torch.Tensor
    mass: torch.Tensor
    votes: torch.Tensor
    strength: list[torch.Tensor]
    sinks: list[torch.Tensor]

    @property
    def common(self) -> torch.Tensor:
        """(T,) bool: positions that can be compared at every step."""
        return self.present.all(0)

    @property
    def heads(self) -> int:
        """Attention heads of all layers."""
        return sum(len(layer) for layer in self.strength)


@dataclass(frozen=True, eq=False)
class _Measurement:
    """One sequence at one step: ids (T,), mass (t,), votes (t,), strength and sinks (H over all layers,)."""

    ids: torch.Tensor
    mass: torch.Tensor
    votes: torch.Tensor
    strength: torch.Tensor
    sinks: torch.Tensor


class Recorder:
    """Collects the attention mass of forward passes; keeps only sums over heads.

    Args:
        sequences: N.
        causal: the model is causal.
    """

    def __init__(self, sequences: int, causal: bool):
        self.sequences, self.causal = sequences, causal
        self._steps: dict[int, dict[int, _Measurement]] = {}  # step -> sequence -> measurement
        self._widths: list[int] = []

    def add(self, steps: list[int], rows: list[int], ids: torch.Tensor, layers: list[torch.Tensor]) -> None:
        """Add a forward pass: step and sequence of each of its B rows, ids (B, T), and L masses (B, H, T)."""
        self._widths = [layer.shape[1] for layer in layers]
        mass = torch.cat(layers, dim=1)  # (B, H of all layers, T)
        total = mass.sum(1)  # (B, T)
        if self.causal:
            compared = max(1, mass.shape[2] - UNSEEN + 1)  # t positions that enough queries can see
            mass, total = per_query(mass)[..., :compared], per_query(total)[:, :compared]
            mass = mass * (compared / mass.sum(-1, keepdim=True))  # an even share is 1, as in a bidirectional head
        sinks = head_sinks(mass)  # (B, H of all layers, t)
        strength = (mass * sinks).sum(-1) / mass.sum(-1)  # (B, H of all layers)
        votes, count = sinks.float().mean(1), sinks.float().sum(-1)  # (B, t), (B, H of all layers)
        parts = (part.cpu() for part in (ids, total, votes, strength, count))
        for step, row, *values in zip(steps, rows, *parts, strict=True):
            # of their own: a view keeps the whole batch, also where it is sent to other processes
            self._steps.setdefault(step, {})[row] = _Measurement(*(value.clone() for value in values))

    def joined(self, workers: Workers) -> "Recorder":
        """What all processes recorded; the sequences of each follow those of the one before."""
        if not workers.several:
            return self
        parts = workers.gather(self)
        whole = Recorder(sum(part.sequences for part in parts), self.causal)
        whole._widths, first = self._widths, 0
        for part in parts:
            for step, rows in part._steps.items():
                whole._steps.setdefault(step, {}).update({first + row: each for row, each in rows.items()})
            first += part.sequences
        return whole

    def finish(self, kind: str, prompt: int, progress: torch.Tensor) -> Trajectory:
        """The trajectory over the steps that all sequences have.

        Args:
            progress: (N, number of all steps).
        """
        steps = [step for step in sorted(self._steps) if len(self._steps[step]) == self.sequences]
        grid = [[self._steps[step][row] for step in steps] for row in range(self.sequences)]
        length = max(len(cell.ids) for cell in grid[0])  # T
        ids, mass, votes = (
            torch.stack([torch.stack([_pad(getattr(cell, name), length) for cell in row]) for row in grid])
            for name in ("ids", "mass", "votes")
        )  # 3 x (N, S, T)
        heads = [
            torch.stack([torch.stack([getattr(cell, name) for cell in row]) for row in grid]).mean((0, 1))
            for name in ("strength", "sinks")
        ]  # 2 x (H of all layers,)
        strength, sinks = (list(part.split(self._widths)) for part in heads)
        present = ~mass[0].isnan()  # (S, T)
        return Trajectory(kind, self.causal, prompt, progress[:, steps], ids, present, mass, votes, strength, sinks)


def _pad(values: torch.Tensor, length: int) -> torch.Tensor:
    """(t,) -> (T,), with NaN, or -1 for integers, at missing positions."""
    filler = torch.nan if values.is_floating_point() else -1
    return torch.cat((values, values.new_full((length - len(values),), filler)))
