"""Forward hooks as context managers: the inputs of linears and the mass of attention. Always removed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from typing_extensions import Self

from structprune.models.adapter import BlockView
from structprune.models.experts_structprune import role_of, tokens_by_expert
from structprune.statistics.sinks import attend_with_mass, even_mass, head_mass

ONE_PASS = 1024  # tokens up to which computing attention and mass in one pass was measured to be faster on CPU
EXPERT_INPUTS = ("mlp_input", "activated")  # of the linears of an expert
ConsumerKey = tuple[int, str]  # (block index, role of the consumer)


@contextmanager
def watch_inputs(modules: dict, visit: Callable) -> Iterator[None]:
    """While open, `visit(key, x)` sees the first input x of every module in `modules` (key -> module)."""
    with ExitStack() as stack:
        for key, module in modules.items():
            hook = module.register_forward_pre_hook(lambda module, args, key=key: visit(key, args[0]))
            stack.callback(hook.remove)
        yield


@contextmanager
def watch_tokens(blocks: list[BlockView], visit: Callable) -> Iterator[None]:
    """While open, `visit((index, input), tokens)` learns which tokens (m,) of a pass every expert of `blocks` sees.

    It is called for all inputs of a mixture of experts before any is computed.
    """

    def see(index: int, experts: int):
        def route(module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            for number, (tokens, _) in enumerate(tokens_by_expert(output[1], experts)):  # (m,)
                for name in EXPERT_INPUTS:
                    visit((index, role_of(name, str(number))), tokens)

        return route

    with ExitStack() as stack:
        for block in blocks:
            if mixture := block.mixture:
                hook = mixture.part("router").register_forward_hook(see(block.index, mixture.experts))
                stack.callback(hook.remove)
        yield


class AttentionMeter:
    """Replaces attention cores and receives the mass (B, H, T) of each; subclasses decide what to keep.

    Where queries see different keys, mass is relative to that of even attention (`even_mass`), which is 1 elsewhere.
    """

    def _add(self, mass: torch.Tensor) -> None:
        raise NotImplementedError

    def _attend(self, core: nn.Module, query, key, value, mask=None) -> torch.Tensor:
        """The core's own computation, and the mass: in one pass where that was measured to be faster."""
        if query.device.type == "cpu" and mask is None and query.shape[2] <= ONE_PASS:
            mixed, mass = attend_with_mass(query, key, value)  # (B, H, T, D), (B, H, T)
        else:
            mixed, mass = type(core).forward(core, query, key, value, mask), head_mass(query, key, mask=mask)
        if mask is not None and mask.dtype == torch.bool and mask.shape[2] > 1:
            mass = mass / even_mass(mask)  # (B, H, T)
        self._add(mass)
        return mixed

    @contextmanager
    def on(self, cores: list[nn.Module]) -> Iterator[Self]:
        """Replace the forward of the attention cores while open."""
        for core in cores:
            core.forward = partial(self._attend, core)
        try:
            yield self
        finally:
            for core in cores:
                del core.forward


class MassMeter(AttentionMeter):
    """Sums attention mass over the layers of the sequences in flight; `take` returns (B, T) and starts anew."""

    def __init__(self) -> None:
        self._mass: torch.Tensor | None = None

    def _add(self, mass: torch.Tensor) -> None:
        mass = mass.sum(1)  # (B, T)
        self._mass = mass if self._mass is None else self._mass + mass

    @property
    def so_far(self) -> torch.Tensor | None:
        """(B, T) mass of the layers that have attended since the last `take`; None before the first."""
        return self._mass

    def take(self) -> torch.Tensor:
        mass, self._mass = self._mass, None
        assert mass is not None, "no layer has attended yet"
        return mass


class HeadMeter(AttentionMeter):
    """Keeps every layer's attention mass; `take` returns a list of (B, H, T), one per layer, and starts anew."""

    def __init__(self) -> None:
        self._layers: list[torch.Tensor] = []

    def _add(self, mass: torch.Tensor) -> None:
        self._layers.append(mass)

    def take(self) -> list[torch.Tensor]:
        layers, self._layers = self._layers, []
        return layers


def consumers(blocks: list[BlockView]) -> dict[ConsumerKey, nn.Linear]:
    """(block index, role) -> the linear that reads attention units or MLP channels, of each part of a mixture too."""
    roles = {
        block.index: [*block.consumers, *(role_of("down", part) for part in block.module.parts)] for block in blocks
    }
    return {(block.index, role): block[role] for block in blocks for role in roles[block.index]}
