"""Forward hooks as context managers: what a linear reads, what attention attends to. Always removed."""

from contextlib import contextmanager
from typing import Callable, Iterator

import torch
from torch import nn

from structprune.models.adapter import CONSUMERS, BlockView
from structprune.statistics.sinks import attention_mass


@contextmanager
def watch_inputs(modules: dict, visit: Callable) -> Iterator[None]:
    """While open, `visit(key, x)` sees the first input x of every module in `modules` (key -> module)."""

    def hook(key):
        return lambda module, args: visit(key, args[0])

    handles = [module.register_forward_pre_hook(hook(key)) for key, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class MassMeter:
    """Sums `attention_mass` over the layers of the sequences in flight; `take` returns (B, T) and starts anew."""

    def __init__(self):
        self._mass: torch.Tensor | None = None

    def _add(self, module, args) -> None:
        mass = attention_mass(args[0], args[1])  # (B, T)
        self._mass = mass if self._mass is None else self._mass + mass

    @property
    def so_far(self) -> torch.Tensor:
        """(B, T) mass of the layers that have attended since the last `take`."""
        return self._mass

    def take(self) -> torch.Tensor:
        mass, self._mass = self._mass, None
        return mass

    @contextmanager
    def on(self, cores: list[nn.Module]) -> Iterator["MassMeter"]:
        """Hook the attention seams `cores` while open."""
        handles = [core.register_forward_pre_hook(self._add) for core in cores]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def consumers(blocks: list[BlockView]) -> dict[tuple[int, str], nn.Linear]:
    """(block index, role) -> the linear that reads attention units or MLP channels."""
    return {(block.index, role): block[role] for block in blocks for role in CONSUMERS}
