"""Tensors that stay in files: mapped into memory, so that the system reads a page when it is used.

Weights are stored in one dtype and computed with in another: a layer that computes takes a copy. Pages that were read
count as resident memory until they are given back, which costs nothing but reading them again.
"""

import ctypes
import errno
import math
import mmap
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from structprune.errors import UserError
from structprune.models.headers import TensorHeader

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
COMPARED = 2**24  # numbers that are compared at a time
CHANGED_REMEDY = "or leave the weights in memory"  # where changed weights do not fit


@dataclass(eq=False)
class Place:
    """Where a file is mapped to, and what its weights are computed with; None: it holds no weights."""

    address: int
    size: int  # bytes
    dtype: torch.dtype | None
    temporary: bool = False

    def give_back(self, address: int, size: int) -> None:
        """Give back the pages of some bytes: the next use reads them from the file."""
        start = max(self.address, address // mmap.PAGESIZE * mmap.PAGESIZE)
        _advise(start, address + size - start)


_PLACES: weakref.WeakSet[Place] = weakref.WeakSet()  # of all mapped files of this process, as its memory is one


def _advise(address: int, size: int) -> None:
    if sys.platform == "linux" and size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _mapped(path: str | Path, size: int, shared: bool, dtype: torch.dtype | None) -> torch.UntypedStorage:
    """A file's first `size` bytes. Writes reach the file where it is `shared`, as only temporary ones are, and are lost
    with the page elsewhere."""
    storage: Any = torch.UntypedStorage.from_file(str(path), shared, size)
    storage.place = Place(storage.data_ptr(), size, dtype, shared)  # lives as long as the storage
    _PLACES.add(storage.place)
    return storage


def _tensor(storage: torch.UntypedStorage, dtype: torch.dtype, shape: tuple[int, ...], first: int = 0) -> torch.Tensor:
    """The tensor at byte `first`."""
    strides = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, first // dtype.itemsize, shape, strides)


def place_of(tensor: torch.Tensor) -> Place | None:
    """Where a tensor's file is mapped; None of one in memory."""
    return None if tensor.device.type != "cpu" else getattr(tensor.untyped_storage(), "place", None)


def working_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype that a weight is computed with: its own, unless it stays on disk."""
    place = place_of(weight)
    return (place and place.dtype) or weight.dtype


def map_shard(path: Path, headers: Mapping[str, TensorHeader], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in their stored dtypes; none of them is read.

    Args:
        headers: of the tensors to map.
        dtype: that they are computed with.
    """
    storage, tensors = _mapped(path, path.stat().st_size, False, dtype), {}
    for name, header in headers.items():
        stored, (first, end) = DTYPES[header.dtype], header.span
        if first % stored.itemsize == 0:
            tensors[name] = _tensor(storage, stored, header.shape, first)
        else:  # a file of another writer, whose header's length is no multiple of 8
            raw = _tensor(storage, torch.uint8, (end - first,), first).clone()  # (bytes,)
            tensors[name] = on_disk(raw.view(stored).view(header.shape), dtype)
    return tensors


def file_tensor(shape: tuple[int, ...], dtype: torch.dtype, remedy: str, working: torch.dtype | None = None):
    """A tensor in a temporary file, which is gone with the tensor.

    Args:
        remedy: what the user can do where it does not fit, beside another TMPDIR.
        working: the dtype that a weight is computed with.
    Raises:
        UserError: the temporary directory is too full.
    """
    size = math.prod(shape) * dtype.itemsize
    with tempfile.NamedTemporaryFile(prefix="structprune-") as file:  # its name goes now, and its room with the map
        _reserve(file.fileno(), size, remedy)
        return _tensor(_mapped(file.name, size, True, working), dtype, shape)


def _reserve(descriptor: int, size: int, remedy: str) -> None:
    """Allocate a file's bytes now: a write to a mapped page that does not fit the disk would kill the process."""
    folder = tempfile.gettempdir()
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        elif shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return  # this file system cannot reserve space
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"{size / 1e9:.3g} GB of temporary files do not fit {folder} ({free / 1e9:.3g} GB free): set TMPDIR to a"
            f" larger disk, {remedy}"
        ) from error


def on_disk(value: torch.Tensor, dtype: torch.dtype, narrow: torch.dtype | None = None) -> torch.Tensor:
    """A weight in a temporary file.

    Args:
        dtype: that it is computed with, and kept in.
        narrow: another dtype to keep it in, if that changes no value.
    Raises:
        UserError: the temporary directory is too full.
    """
    stored, kept = value.detach().to("cpu", dtype), dtype
    if narrow is not None and narrow.itemsize < dtype.itemsize:
        parts = stored.flatten().split(COMPARED)
        kept = narrow if all(torch.equal(part.to(narrow).to(dtype), part) for part in parts) else dtype
    tensor = file_tensor(tuple(value.shape), kept, CHANGED_REMEDY, dtype)
    tensor.copy_(stored)
    give_back(tensor)
    return tensor


def in_place_of(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` as a weight like `old`: on its device and in its dtype, or on disk where `old` is."""
    place, own = place_of(old), place_of(value)
    if place is None or place.dtype is None:
        return value.to(old.device, old.dtype)
    if own is not None and own.dtype == place.dtype:
        return value
    return on_disk(value, place.dtype, old.dtype)


def give_back(tensor: torch.Tensor) -> None:
    """Give back the pages of a mapped tensor; of another, nothing happens."""
    if place := place_of(tensor):
        place.give_back(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def give_back_pages() -> None:
    """Give back the pages of all mapped files."""
    for place in list(_PLACES):
        place.give_back(place.address, place.size)
