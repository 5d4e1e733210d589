"""What was measured over a trajectory, and how single forward passes are put together to one.

Shapes: N sequences, S steps, T positions, B sequences of a forward pass, L layers, H heads of one of them.
"""

from dataclasses import dataclass

import torch

from structprune.sinks.diagnostics import head_sinks, per_query

UNSEEN = 8  # a causal model's last positions are seen by fewer queries than this, too few to tell a mean from chance


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Attention mass of N sequences over S steps, on CPU.

    Attributes:
        kind: "forward" (noise levels) or "reverse" (the model's own generation).
        causal: mass is per query that sees a position (`per_query`).
        prompt: positions 0..prompt-1 hold the same token at every step of a generation; 0 for noise levels.
        progress: (N, S) share of the text that is visible (1 - p of a noise level), or of the generation that is done.
        ids: (N, S, T) int64, what the model was given.
        present: (S, T) bool, the positions that can be compared at a step: of a causal model those that are there and
            that at least `UNSEEN` queries see, else all.
        mass: (N, S, T) fp32 over all layers and heads, NaN where not present.
        votes: (N, S, T) share of the heads of which the position is a sink (`head_sinks`), NaN where not present.
        strength: per layer (H,) share of a head's attention that goes to its sinks, mean over sequences and steps.
        sinks: per layer (H,) how many sinks it has, the same mean.
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
        """(T,) bool: the positions that can be compared at every step."""
        return self.present.all(0)

    @property
    def heads(self) -> int:
        """Attention heads of all layers."""
        return sum(len(layer) for layer in self.strength)


@dataclass(frozen=True, eq=False)
class _Found:
    """One sequence at one step: ids (T,), mass (T,), votes (T,), strength and sinks (H over all layers,)."""

    ids: torch.Tensor
    mass: torch.Tensor
    votes: torch.Tensor
    strength: torch.Tensor
    sinks: torch.Tensor


class Recorder:
    """Takes in the attention mass of one forward pass after another; keeps sums over heads only.

    Args:
        sequences: N.
        causal: of the model.
    """

    def __init__(self, sequences: int, causal: bool):
        self.sequences, self.causal = sequences, causal
        self._found: dict[int, dict[int, _Found]] = {}  # step -> sequence -> what was found
        self._widths: list[int] = []

    def add(self, steps: list[int], rows: list[int], ids: torch.Tensor, layers: list[torch.Tensor]) -> None:
        """One forward pass: the step and sequence of each of its B rows, ids (B, T), L masses (B, H, T)."""
        self._widths = [layer.shape[1] for layer in layers]
        mass = torch.cat(layers, dim=1)  # (B, H of all layers, T)
        total = mass.sum(1)  # (B, T)
        if self.causal:
            seen = max(1, mass.shape[2] - UNSEEN + 1)  # positions that enough queries see
            mass, total = per_query(mass)[..., :seen], per_query(total)[:, :seen]
            mass = mass * (seen / mass.sum(-1, keepdim=True))  # an even share is 1 in every head, as without a mask
        chosen = head_sinks(mass)  # (B, H of all layers, t)
        strength = (mass * chosen).sum(-1) / mass.sum(-1)  # (B, H of all layers)
        votes, count = chosen.float().mean(1), chosen.float().sum(-1)  # (B, t), (B, H of all layers)
        parts = (part.cpu() for part in (ids, total, votes, strength, count))
        for step, row, *found in zip(steps, rows, *parts):
            self._found.setdefault(step, {})[row] = _Found(*found)

    def finish(self, kind: str, prompt: int, progress: torch.Tensor) -> Trajectory:
        """The trajectory over the steps that every sequence took part in.

        Args:
            progress: (N, all steps).
        """
        steps = [step for step in sorted(self._found) if len(self._found[step]) == self.sequences]
        grid = [[self._found[step][row] for step in steps] for row in range(self.sequences)]
        length = max(len(found.ids) for found in grid[0])  # T
        ids, mass, votes = (
            torch.stack([torch.stack([_padded(getattr(found, name), length) for found in row]) for row in grid])
            for name in ("ids", "mass", "votes")
        )  # 3 x (N, S, T)
        heads = [
            torch.stack([torch.stack([getattr(found, name) for found in row]) for row in grid]).mean((0, 1))
            for name in ("strength", "sinks")
        ]  # 2 x (H of all layers,)
        strength, sinks = (list(part.split(self._widths)) for part in heads)
        present = ~mass[0].isnan()  # (S, T)
        return Trajectory(kind, self.causal, prompt, progress[:, steps], ids, present, mass, votes, strength, sinks)


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    """(t,) -> (T,): NaN, or -1 among integers, where a position is not there."""
    filler = torch.nan if values.is_floating_point() else -1
    return torch.cat((values, values.new_full((length - len(values),), filler)))
