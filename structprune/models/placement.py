"""Where a model computes: on the device that holds it, or on one that each layer visits only while it computes."""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from structprune.errors import UserError
from structprune.models.maps import give_back, give_back_pages, place_of, working_dtype
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.transfer import Lane, Pending, lane_to


def give_back_memory() -> None:
    """Return freed host memory to the system, which glibc otherwise keeps, and the pages of mapped files.

    Without this, many matrices of different sizes leave a heap that grows with every block.
    """
    give_back_pages()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def pick_device(name: str | None, absent: bool = False) -> torch.device:
    """The device of that name; by default CUDA where there is one, else the CPU.

    Args:
        absent: a CUDA device need not be on this machine.
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
    if device.type == "cuda" and (device.index or 0) >= count and not absent:
        raise UserError(f"device '{name}' is not on this machine ({count} CUDA devices): use cpu")
    return device


def synchronise(device: torch.device) -> None:
    """Wait for the work started on a device, so that a clock read next includes it: CUDA calls return before that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compute_device(model: DiffusionLM) -> torch.device:
    """The device that `model` computes on, and takes inputs on: its weights' device, unless they are streamed."""
    return getattr(model, "streamed_to", None) or model.embedding.weight.device


def compute_dtype(model: DiffusionLM) -> torch.dtype:
    """The dtype that `model` computes in: its weights', unless those stay on disk."""
    return working_dtype(model.embedding.weight)


def stays_on_disk(model: DiffusionLM) -> bool:
    """Whether a model's weights are in files (`structprune.models.loading.map_model`)."""
    return place_of(model.embedding.weight) is not None


class _Copy(NamedTuple):
    """A weight's copy to the device under way, and the state the weight was in."""

    weight: nn.Parameter
    state: tuple[int, int] | None
    pending: Pending


SMALL_WEIGHT = 2**18  # numbers up to which a copy has memory of its own
COPIED_AT_ONCE = 2**24  # numbers
WIDEST_ROOM = 4  # times what a weight needs: the head's room is not held while blocks compute


class _Room:
    """Memory for the copy of one large weight at a time.

    The system fills fresh memory with zeros page by page, which was measured to take three times as long as the copy.
    """

    def __init__(self) -> None:
        self._numbers: torch.Tensor | None = None

    def copy(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy on the CPU, valid until the next one."""
        count, room = weight.numel(), self._numbers
        if room is None or room.dtype != dtype or not count <= room.numel() <= WIDEST_ROOM * count:
            self._numbers = room = None  # freed before the next is there
            with torch.inference_mode(False):  # else it could not be written to outside that mode
                room = self._numbers = torch.empty(count, dtype=dtype)
        copy, weight = room[:count].view(weight.shape), weight.detach()
        for part, source in zip(copy.split(_rows(weight)), weight.split(_rows(weight))):
            part.copy_(source)
            give_back(source)  # so that no whole weight of a file is resident beside its copy
        return copy


def _rows(weight: torch.Tensor) -> int:
    """Rows of a weight (O, C) that are copied at a time."""
    return max(1, COPIED_AT_ONCE * len(weight) // weight.numel())


class _Weights:
    """Brings a layer's weights to a device while it computes; over a lane the next layer's are copied meanwhile.

    The next layer is taken to be the one that came next when the present one computed before.
    """

    def __init__(self, device: torch.device, lane: Lane | None):
        self._device, self._lane, self._room = device, lane, _Room()
        self._originals: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self._next: dict[nn.Module, nn.Module] = {}
        self._last: nn.Module | None = None
        self._ahead: tuple[nn.Module, dict[str, _Copy]] | None = None

    def go(self, module: nn.Module, args: tuple) -> None:
        """Before a layer computes: replace its weights by copies on the device."""
        copies = self.take(module)
        self._originals[module] = dict(module.named_parameters(recurse=False))
        for name, copy in copies.items():
            setattr(module, name, nn.Parameter(copy, requires_grad=False))

    def back(self, module: nn.Module, args: tuple, output: object) -> None:
        """After a layer computed: put its weights back, and begin to copy the layer that is likely to come next."""
        for name, weight in self._originals.pop(module, {}).items():
            setattr(module, name, weight)
            give_back(weight)
        if self._lane is not None and self._last in self._next:
            following = self._next[self._last]
            self._ahead = (following, _begin_copies(following, self._lane))

    def take(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """A layer's own weights on the device, by name, in the dtype they are computed with."""
        weights = dict(module.named_parameters(recurse=False))
        dtypes = {name: working_dtype(weight) for name, weight in weights.items()}
        if self._lane is None:
            return {name: self._copy(weight, dtypes[name]) for name, weight in weights.items()}
        if self._last is not None:
            self._next[self._last] = module
        ahead, self._ahead, self._last = self._ahead, None, module
        if ahead is not None and ahead[0] is module and _unchanged(weights, ahead[1]):
            copies = ahead[1]
        else:
            copies = _begin_copies(module, self._lane)
        return {name: self._lane.land(copy.pending).to(dtypes[name]) for name, copy in copies.items()}

    def _copy(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._device.type == "cpu" and weight.dim() > 1 and weight.numel() > SMALL_WEIGHT:
            return self._room.copy(weight, dtype)
        return weight.detach().to(self._device, dtype, non_blocking=True, copy=True)


def _begin_copies(module: nn.Module, lane: Lane) -> dict[str, _Copy]:
    weights = module.named_parameters(recurse=False)
    return {name: _Copy(weight, _state(weight), lane.fetch(weight)) for name, weight in weights}


def _state(weight: torch.Tensor) -> tuple[int, int] | None:
    """Changes with a weight's values; None of an inference tensor, which has no version."""
    return None if weight.is_inference() else (weight._version, weight.data_ptr())


def _unchanged(weights: Mapping[str, nn.Parameter], copies: dict[str, _Copy]) -> bool:
    """Whether a layer's weights are those that were copied: a refit may have replaced or changed them."""
    return weights.keys() == copies.keys() and all(
        weights[name] is copy.weight and copy.state is not None and _state(copy.weight) == copy.state
        for name, copy in copies.items()
    )


def _to_rows(module: nn.Module, args: tuple) -> tuple:
    """Before an embedding on disk is read: its ids on the host, so that no more than their rows are read."""
    return tuple(each.cpu() for each in args)


def _from_rows(device: torch.device):
    def visit(module: nn.Embedding, args: tuple, output: torch.Tensor) -> torch.Tensor:
        give_back(module.weight)
        return output.to(device, working_dtype(module.weight))

    return visit


@contextmanager
def streamed(model: DiffusionLM, device: torch.device | None, overlap: bool = False) -> Iterator[DiffusionLM]:
    """While open, `model` computes on `device`, with one layer's copy there at a time; its weights stay where they are,
    in host memory or on disk.

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
        if isinstance(module, nn.Embedding) and place_of(module.weight):
            handles.append(module.register_forward_pre_hook(_to_rows))
            handles.append(module.register_forward_hook(_from_rows(device)))
        elif any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(weights.go))
            handles.append(module.register_forward_hook(weights.back, always_call=True))
    model.streamed_to = device
    try:
        yield model
    finally:
        model.streamed_to = None
        for handle in handles:
            handle.remove()
