"""Where a model computes: a device of the user's choice, or one that each layer visits only while it computes."""

import ctypes
import sys
from contextlib import contextmanager
from typing import Iterator

import torch
from torch import nn

from structprune.errors import UserError
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.transfer import Lane, lane_to


def give_back_memory() -> None:
    """Return freed host memory to the system where the C library keeps it (glibc).

    Without this, matrices of many sizes that come and go leave a heap that grows with every block.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def pick_device(asked: str | None) -> torch.device:
    """The device asked for, else CUDA where there is one.

    Raises:
        UserError: not a device, or one this machine has not.
    """
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise UserError(f"unknown device '{asked}': give cpu or cuda[:N]") from error
    if device.type not in ("cpu", "cuda"):  # others lack the fp64 that refits are solved in
        raise UserError(f"device '{asked}' cannot be used: give cpu or cuda[:N]")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device '{asked}' is not on this machine ({torch.cuda.device_count()} CUDA devices): use cpu")
    return device


def synchronise(device: torch.device) -> None:
    """Wait for what was started on a device, so that a clock read next counts it; on CUDA calls return before that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compute_device(model: DiffusionLM) -> torch.device:
    """Where inputs must be for `model` to compute on them: its weights' device, unless they are streamed."""
    return getattr(model, "streamed_to", None) or model.embedding.weight.device


class _Weights:
    """Brings layers' weights to a device; over a lane the next layer's while the present one computes.

    The next layer is the one that came next when this one had computed before.
    """

    def __init__(self, device: torch.device, lane: Lane | None):
        self._device, self._lane = device, lane
        self._next: dict[nn.Module, nn.Module] = {}
        self._last: nn.Module | None = None
        self._ahead: tuple[nn.Module, dict] | None = None

    def take(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """A layer's own weights on the device, by name."""
        weights = dict(module.named_parameters(recurse=False))
        if self._lane is None:
            return {name: w.detach().to(self._device, non_blocking=True, copy=True) for name, w in weights.items()}
        if self._last is not None:
            self._next[self._last] = module
        ahead, self._ahead, self._last = self._ahead, None, module
        if ahead is None or ahead[0] is not module or not _as_fetched(weights, ahead[1]):
            ahead = (module, self._fetch(module))
        return {name: self._lane.land(fetch) for name, (_, _, fetch) in ahead[1].items()}

    def look_ahead(self) -> None:
        """Fetch what is likely to be taken next."""
        following = self._next.get(self._last)
        if following is not None:
            self._ahead = (following, self._fetch(following))

    def _fetch(self, module: nn.Module) -> dict:
        """Name -> a weight, its state and its copy under way."""
        weights = module.named_parameters(recurse=False)
        return {name: (weight, _state(weight), self._lane.fetch(weight)) for name, weight in weights}


def _state(weight: torch.Tensor) -> tuple[int, int] | None:
    """What changes with a weight's numbers; None where nothing tells (an inference tensor)."""
    return None if weight.is_inference() else (weight._version, weight.data_ptr())


def _as_fetched(weights: dict[str, torch.Tensor], fetched: dict) -> bool:
    """Whether a layer's weights are those that were fetched, unchanged: a refit may have come between."""
    if weights.keys() != fetched.keys():
        return False
    pairs = [(weights[name], weight, state) for name, (weight, state, _) in fetched.items()]
    return all(now is then and state is not None and _state(now) == state for now, then, state in pairs)


class _Visit:
    """Takes one layer's weights to a device before it computes and puts the originals back after."""

    def __init__(self, weights: _Weights):
        self._weights, self.home = weights, {}

    def go(self, module: nn.Module, args) -> None:
        away = self._weights.take(module)
        self.home = dict(module.named_parameters(recurse=False))
        for name, there in away.items():
            setattr(module, name, nn.Parameter(there, requires_grad=False))

    def back(self, module: nn.Module, args, output) -> None:
        for name, weight in self.home.items():
            setattr(module, name, weight)
        self.home = {}
        self._weights.look_ahead()


def stream_target(offload: bool, device: str | None) -> torch.device | None:
    """The device to stream weights to, or None where they are to stay on the device they are on.

    Raises:
        UserError: streaming is asked for and there is no accelerator to stream to.
    """
    if not offload:
        return None
    target = pick_device(device)
    if target.type == "cpu":
        raise UserError("memory.offload streams weights to an accelerator, and the device is cpu: leave it off")
    return target


@contextmanager
def streamed(model: DiffusionLM, device: torch.device | None, overlap: bool = False) -> Iterator[DiffusionLM]:
    """While open, `model` computes on `device` though its weights stay at home: one layer's copy is there at a time.

    For forward passes only: a backward pass would look for weights that are gone. None changes nothing.

    Args:
        overlap: on an accelerator the next layer's copy is made while a layer computes.
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
