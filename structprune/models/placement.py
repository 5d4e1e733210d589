"""Where a model computes: on the device that holds it, or on one that each layer visits only while it computes."""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from structprune.errors import UserError
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.transfer import Fetch, Lane, lane_to


def give_back_memory() -> None:
    """Return freed host memory to the system, which glibc otherwise keeps.

    Without this, many matrices of different sizes leave a heap that grows with every block.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def pick_device(name: str | None, elsewhere: bool = False) -> torch.device:
    """The device of that name; by default CUDA where there is one, else the CPU.

    Args:
        elsewhere: it may be on another machine, for a dry run.
    Raises:
        UserError: not a device's name, or a device that this machine does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}': give cpu or cuda[:N]") from error
    if device.type not in ("cpu", "cuda"):  # others lack the fp64 that refits are solved in
        raise UserError(f"device '{name}' cannot be used: give cpu or cuda[:N]")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count and not elsewhere:
        raise UserError(f"device '{name}' is not on this machine ({count} CUDA devices): use cpu")
    return device


def synchronise(device: torch.device) -> None:
    """Wait for the work started on a device, so that a clock read next includes it: CUDA calls return before that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compute_device(model: DiffusionLM) -> torch.device:
    """The device that `model` computes on, and takes inputs on: its weights' device, unless they are streamed."""
    return getattr(model, "streamed_to", None) or model.embedding.weight.device


class _Copy(NamedTuple):
    """A weight's copy to the device under way, and the state the weight was in."""

    weight: nn.Parameter
    state: tuple[int, int] | None
    fetch: Fetch


class _Weights:
    """Copies layers' weights to a device; over a lane the next layer's while the present one computes.

    The next layer is taken to be the one that came next when the present one computed before.
    """

    def __init__(self, device: torch.device, lane: Lane | None):
        self._device, self._lane = device, lane
        self._next: dict[nn.Module, nn.Module] = {}
        self._last: nn.Module | None = None
        self._ahead: tuple[nn.Module, dict[str, _Copy]] | None = None

    def take(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """A layer's own weights on the device, by name."""
        weights = dict(module.named_parameters(recurse=False))
        if self._lane is None:
            return {name: w.detach().to(self._device, non_blocking=True, copy=True) for name, w in weights.items()}
        if self._last is not None:
            self._next[self._last] = module
        ahead, self._ahead, self._last = self._ahead, None, module
        if ahead is not None and ahead[0] is module and _unchanged(weights, ahead[1]):
            copies = ahead[1]
        else:
            copies = _begin_copies(module, self._lane)
        return {name: self._lane.land(copy.fetch) for name, copy in copies.items()}

    def look_ahead(self) -> None:
        """Begin to copy the layer that is likely to come next."""
        if self._lane is not None and self._last is not None and self._last in self._next:
            following = self._next[self._last]
            self._ahead = (following, _begin_copies(following, self._lane))


def _begin_copies(module: nn.Module, lane: Lane) -> dict[str, _Copy]:
    """Begin to copy a layer's weights, by name."""
    weights = module.named_parameters(recurse=False)
    return {name: _Copy(weight, _state(weight), lane.fetch(weight)) for name, weight in weights}


def _state(weight: torch.Tensor) -> tuple[int, int] | None:
    """Changes with a weight's values; None of an inference tensor, which has no version."""
    return None if weight.is_inference() else (weight._version, weight.data_ptr())


def _unchanged(weights: Mapping[str, nn.Parameter], copies: dict[str, _Copy]) -> bool:
    """Whether a layer's weights are those that were copied: a refit may have replaced or changed them."""
    if weights.keys() != copies.keys():
        return False
    pairs = [(weights[name], copy) for name, copy in copies.items()]
    return all(now is copy.weight and copy.state is not None and _state(now) == copy.state for now, copy in pairs)


class _Visit:
    """Moves one layer's weights to a device before it computes, and puts the originals back afterwards."""

    def __init__(self, weights: _Weights):
        self._weights = weights
        self._originals: dict[str, nn.Parameter] = {}

    def go(self, module: nn.Module, args: tuple) -> None:
        copies = self._weights.take(module)
        self._originals = dict(module.named_parameters(recurse=False))
        for name, copy in copies.items():
            setattr(module, name, nn.Parameter(copy, requires_grad=False))

    def back(self, module: nn.Module, args: tuple, output: object) -> None:
        for name, weight in self._originals.items():
            setattr(module, name, weight)
        self._originals = {}
        self._weights.look_ahead()


@contextmanager
def streamed(model: DiffusionLM, device: torch.device | None, overlap: bool = False) -> Iterator[DiffusionLM]:
    """While open, `model` computes on `device`, and its weights stay where they are but for one layer's copy at a time.

    For forward passes only: a backward pass would need the copies after they are dropped.

    Args:
        device: None changes nothing.
        overlap: copy the next layer to the accelerator while one computes.
    """
    if device is None:
        yield model
        return
    handles, weights = [], _Weights(device, lane_to(device) if overlap else None)
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            visit = _Visit(weights)
            handles.append(module.register_forward_pre_hook(visit.go))
            handles.append(module.register_forward_hook(visit.back, always_call=True))
    model.streamed_to = device
    try:
        yield model
    finally:
        model.streamed_to = None
        for handle in handles:
            handle.remove()
