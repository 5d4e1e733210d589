"""Copies between host and accelerator that neither waits for longer than it must.

All of them go through a few small pinned buffers: weights and hidden states stay where they are, in pageable memory or
in a mapped file, none of it is locked, and what is locked does not grow with the model.
"""

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

CHUNK = 2**26  # bytes of a pinned buffer
BUFFERS = 2  # of each direction: one is filled or emptied by the host while the other is under way
PINNED_BYTES = 2 * BUFFERS * CHUNK  # of a `Lane`


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small host tensor on a device. An accelerator that is busy is not waited for: from pageable memory CUDA would
    first finish all that it has been given."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    try:
        tensor = tensor.pin_memory()  # torch keeps the pinned copy until the transfer is done
    except RuntimeError:  # no more memory can be pinned
        return tensor.to(device)
    return tensor.to(device, non_blocking=True)


class CudaQueue:
    """A CUDA stream for copies, beside the stream that computes (the current one when a method is called).

    Raises:
        RuntimeError: no memory can be pinned.
    """

    def __init__(self, device: torch.device):
        self.device, self._stream = device, torch.cuda.Stream(device)
        with torch.inference_mode(False):  # else nothing could be written to them outside that mode
            self.buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2 * BUFFERS)]

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Device memory to copy into, which nothing that still computes can be using."""
        with torch.cuda.stream(self._stream):
            return torch.empty(shape, dtype=dtype, device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin a copy after those before it; the event of its end."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def computed(self) -> Any:
        """The event of the end of what computes so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def copy_after(self, event: Any) -> None:
        """Later copies begin after an event."""
        self._stream.wait_event(event)

    def compute_after(self, event: Any, uses: torch.Tensor) -> None:
        """What computes from now on begins after an event and may use a tensor of `empty`."""
        now = torch.cuda.current_stream(self.device)
        now.wait_event(event)
        uses.record_stream(now)  # its memory is not given away before that is done with it

    def wait(self, event: Any) -> None:
        """The host waits for an event."""
        event.synchronize()


@dataclass(frozen=True)
class Fetch:
    """A copy to the device under way: nothing may look at `there` before `Lane.land`."""

    there: torch.Tensor
    done: Any


@dataclass(frozen=True)
class Deposit:
    """A device tensor on its way to the host: it may not be changed before `Lane.settle`."""

    there: torch.Tensor
    ready: Any


class Lane:
    """Both directions of one accelerator, over a queue of copies (`CudaQueue`)."""

    def __init__(self, queue):
        self._queue = queue
        half = len(queue.buffers) // 2
        self._down = deque((buffer, None) for buffer in queue.buffers[:half])  # to the device, oldest use first
        self._up = deque(queue.buffers[half:])

    def fetch(self, host: torch.Tensor) -> Fetch:
        """Begin to copy a host tensor, which may change once this returns."""
        there = self._queue.empty(host.shape, host.dtype)
        source, target, done = _bytes(host), _bytes(there), None
        for part in self._chunks(source):
            buffer, used = self._down.popleft()
            if used is not None:
                self._queue.wait(used)  # before it is overwritten
            room = buffer[: part.stop - part.start]
            room.copy_(source[part])
            done = self._queue.copy(target[part], room)
            self._down.append((buffer, done))
        return Fetch(there, done)

    def land(self, fetch: Fetch) -> torch.Tensor:
        """The fetched tensor, to compute with from now on."""
        if fetch.done is not None:  # not so for a tensor without numbers
            self._queue.compute_after(fetch.done, fetch.there)
        return fetch.there

    def deposit(self, there: torch.Tensor) -> Deposit:
        """Note a device tensor, as what has been computed so far makes it, to be brought to the host by `settle`."""
        there = there.contiguous()
        return Deposit(there, self._queue.computed())

    def settle(self, deposit: Deposit, host: torch.Tensor) -> None:
        """Bring a deposit to a host tensor of its shape and dtype; the host waits until it is there.

        It waits for what had been computed when the deposit was made, not for what has been started since.
        """
        self._queue.copy_after(deposit.ready)
        source, target = _bytes(deposit.there), _bytes(host)
        under_way: deque = deque()
        for part in self._chunks(source):
            if len(under_way) == len(self._up):
                self._empty(under_way.popleft(), target)
            buffer = self._up.popleft()
            self._up.append(buffer)
            room = buffer[: part.stop - part.start]
            under_way.append((part, room, self._queue.copy(room, source[part])))
        while under_way:
            self._empty(under_way.popleft(), target)

    def _chunks(self, data: torch.Tensor) -> list[slice]:
        """Parts of (n,) bytes that fit a buffer."""
        size = len(self._up[0])
        return [slice(start, min(start + size, len(data))) for start in range(0, len(data), size)]

    def _empty(self, copy: tuple, target: torch.Tensor) -> None:
        part, room, done = copy
        self._queue.wait(done)
        target[part].copy_(room)


@lru_cache
def lane_to(device: torch.device) -> Lane | None:
    """The lane of a CUDA device; None for other devices, where no memory can be pinned, and where it does not carry."""
    if device.type != "cuda":
        return None
    try:
        lane = Lane(CudaQueue(device))
        return lane if carries(lane, BUFFERS * CHUNK + CHUNK // 2) else None  # every buffer, and one of them twice
    except RuntimeError:
        return None


def carries(lane: Lane, size: int) -> bool:
    """Whether `size` bytes come back as what was computed with them: tried once, before anything depends on it."""
    host = torch.arange(251, dtype=torch.uint8).repeat(size // 251 + 1)[:size]  # (size,), no two buffers alike
    back = torch.zeros_like(host)  # (size,)
    lane.settle(lane.deposit(lane.land(lane.fetch(host)) * 3), back)
    return torch.equal(back, host * 3)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a contiguous tensor as bytes, (n,) uint8 of the same memory; of another host tensor a copy."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


class StagedRows:
    """Rows of a host tensor that an accelerator reads, batch after batch, and replaces.

    The next batch is fetched while the present one is computed with; what is written is brought to the host when the
    next batch has been written, or when its rows are read before.

    Args:
        store: (R, ...) contiguous, in memory or mapped to a file; nobody else may look at it.
        batch: rows that are usually read at a time.
    """

    def __init__(self, store: torch.Tensor, lane: Lane, batch: int):
        self._store, self._lane, self._batch = store, lane, batch
        self._ahead: tuple[slice, Fetch] | None = None
        self._written: tuple[slice, Deposit] | None = None

    def read(self, rows: slice) -> torch.Tensor:
        """Some rows on the device, (b, ...); those behind them, or the first, are on their way afterwards."""
        rows = self._within(rows)
        if self._ahead is not None and self._ahead[0] == rows:
            found, self._ahead = self._ahead[1], None
        else:
            found = self._fetch(rows)
        there = self._lane.land(found)
        start = rows.stop % len(self._store)
        following = self._within(slice(start, start + self._batch))
        if not _meet(following, rows) and (self._ahead is None or self._ahead[0] != following):
            self._ahead = (following, self._fetch(following))
        return there

    def write(self, rows: slice, states: torch.Tensor) -> None:
        """Replace some rows by (b, ...), which may not be changed afterwards."""
        rows = self._within(rows)
        self._settle()
        if self._ahead is not None and _meet(self._ahead[0], rows):
            self._ahead = None  # it is of what was there before
        self._written = (rows, self._lane.deposit(states.to(self._store.dtype)))

    def _fetch(self, rows: slice) -> Fetch:
        if self._written is not None and _meet(self._written[0], rows):
            self._settle()
        return self._lane.fetch(self._store[rows])

    def _settle(self) -> None:
        if self._written is not None:
            rows, deposit = self._written
            self._lane.settle(deposit, self._store[rows])
            self._written = None

    def _within(self, rows: slice) -> slice:
        return slice(rows.start, min(rows.stop, len(self._store)))


def _meet(one: slice, other: slice) -> bool:
    return one.start < other.stop and other.start < one.stop
