"""Removal paths: the order in which a block's units of one kind are removed, and what each step costs.

A *step* removes one head, one KV group, one query head of every KV group, or one MLP channel. Every score reduces to a
path, so that allocation does not depend on scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class RemovalPath:
    """The order in which the units of one block and kind are removed.

    Under `global` allocation ranks are compared directly over blocks and kinds; without them, cost per parameter.
    """

    steps: tuple[tuple[int, ...], ...]  # unit indices of each step, first removed first
    cost: torch.Tensor  # (len(steps),) fp64, the loss each step adds, in the score's own unit
    rank: torch.Tensor | None = None  # (len(steps),) fp64

    def removed(self, count: int) -> list[int]:
        """Sorted units removed by the first `count` steps."""
        return sorted(unit for step in self.steps[:count] for unit in step)


def path_tensors(path: RemovalPath, name: str) -> dict[str, torch.Tensor]:
    """A path as named tensors for a file; `path_of` reads them."""
    tensors = {
        f"{name}.steps": torch.tensor(path.steps),
        f"{name}.cost": path.cost,
    }  # (steps, units per step), (steps,)
    return tensors if path.rank is None else tensors | {f"{name}.rank": path.rank}


def path_of(tensors: Mapping[str, torch.Tensor], name: str) -> RemovalPath:
    """The path of `path_tensors`."""
    steps = tuple(map(tuple, tensors[f"{name}.steps"].tolist()))
    return RemovalPath(steps, tensors[f"{name}.cost"], tensors.get(f"{name}.rank"))


def step_groups(units: int, groups: int) -> list[list[int]]:
    """Unit indices in `groups` equal runs; a step removes one unit of each run (one run: any unit may go)."""
    per = units // groups
    return [list(range(group * per, (group + 1) * per)) for group in range(groups)]


def static_path(cost: torch.Tensor, groups: Sequence[Sequence[int]], rank: torch.Tensor | None = None) -> RemovalPath:
    """Cheapest first by fixed costs: step k removes the k-th cheapest unit of every group.

    Args:
        cost: (U,) per unit; a step's cost is the sum over its units.
        rank: (U,) optional; a step's is the mean over its units.
    """
    cost = cost.double().cpu()
    orders = [sorted(group, key=cost.tolist().__getitem__) for group in groups]
    steps = tuple(zip(*orders, strict=True))
    index = torch.tensor(steps)  # (steps, units per step)
    path = RemovalPath(steps, cost[index].sum(1))
    return path if rank is None else replace(path, rank=rank.double().cpu()[index].mean(1))


def even_path(cost: torch.Tensor, groups: int) -> RemovalPath:
    """One unit a step, in rounds that take the next cheapest of every one of so many equal runs of units: (E,)."""
    rounds = static_path(cost, step_groups(len(cost), groups)).steps
    steps = tuple((unit,) for each in rounds for unit in each)
    return RemovalPath(steps, cost.double().cpu()[[unit for (unit,) in steps]])


def per_unit(columns: torch.Tensor, width: int) -> torch.Tensor:
    """Sum over each unit's `width` neighbouring columns: (U * width,) -> (U,)."""
    return columns.view(-1, width).sum(1)
