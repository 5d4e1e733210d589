"""Copies between host and accelerator that overlap with computation.

All of them go through a few small pinned buffers. Weights and hidden states stay in pageable memory or in a mapped
file, so that pinned memory does not grow with the model.
"""

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

CHUNK = 2**26  # bytes of a pinned buffer
BUFFERS = 2  # of each direction: the host fills or empties one while the other is copied
PINNED_BYTES = 2 * BUFFERS * CHUNK  # of a `Lane`


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small host tensor to a device without a device sync: from pageable memory CUDA would first finish all
    queued work."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    try:
        tensor = tensor.pin_memory()  # torch keeps the pinned copy until the transfer is done
    except RuntimeError:  # no more memory can be pinned
        return tensor.to(device)
    return tensor.to(device, non_blocking=True)


class CudaQueue:
    """A CUDA stream for copies, beside the stream that computes (the current stream when a method is called).

    Raises:
        RuntimeError: no memory can be pinned.
    """

    def __init__(self, device: torch.device):
        self.device, self._stream = device, torch.cuda.Stream(device)
        with torch.inference_mode(False):  # else the buffers could not be written to outside that mode
            self.buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2 * BUFFERS)]

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Device memory to copy into, which no running kernel uses."""
        with torch.cuda.stream(self._stream):
            return torch.empty(shape, dtype=dtype, device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Queue a copy behind those before it; returns the event of its end."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def computed(self) -> Any:
        """The event of the end of all computation queued so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def copy_after(self, event: Any) -> None:
        """Later copies begin after an event."""
        self._stream.wait_event(event)

    def compute_after(self, event: Any, uses: torch.Tensor) -> None:
        """Later computation begins after an event and may use a tensor of `empty`."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        uses.record_stream(stream)  # its memory is not reused before the stream is done with it

    def wait(self, event: Any) -> None:
        """The host waits for an event."""
        event.synchronize()


@dataclass(frozen=True)
class Fetch:
    """A copy to the device under way: `there` may not be read before `Lane.land`."""

    there: torch.Tensor
    done: Any


@dataclass(frozen=True)
class Deposit:
    """A device tensor to be copied to the host: it may not be changed before `Lane.settle`."""

    there: torch.Tensor
    ready: Any


class Lane:
    """Both directions of copies of one accelerator, over a queue of copies (`CudaQueue`, or a stand-in in tests)."""

    def __init__(self, queue: Any):
        self._queue = queue
        half = len(queue.buffers) // 2
        self._down = deque((buffer, None) for buffer in queue.buffers[:half])  # to the device, oldest use first
        self._up = deque(queue.buffers[half:])

    def fetch(self, host: torch.Tensor) -> Fetch:
        """Begin to copy a host tensor to the device; it may change once this returns."""
        there = self._queue.empty(host.shape, host.dtype)
        source, target, done = _bytes(host), _bytes(there), None
        for part in self._chunks(source):
            buffer, last_use = self._down.popleft()
            if last_use is not None:
                self._queue.wait(last_use)  # before it is overwritten
            chunk = buffer[: part.stop - part.start]
            chunk.copy_(source[part])
            done = self._queue.copy(target[part], chunk)
            self._down.append((buffer, done))
        return Fetch(there, done)

    def land(self, fetch: Fetch) -> torch.Tensor:
        """The fetched tensor, which later computation may use."""
        if fetch.done is not None:  # None of an empty tensor
            self._queue.compute_after(fetch.done, fetch.there)
        return fetch.there

    def deposit(self, there: torch.Tensor) -> Deposit:
        """A device tensor, as the computation queued so far leaves it, for `settle` to copy to the host."""
        there = there.contiguous()
        return Deposit(there, self._queue.computed())

    def settle(self, deposit: Deposit, host: torch.Tensor) -> None:
        """Copy a deposit to a host tensor of its shape and dtype; returns when it is complete.

        The host waits for the computation that was queued when the deposit was made, not for later work.
        """
        self._queue.copy_after(deposit.ready)
        source, target = _bytes(deposit.there), _bytes(host)
        copies: deque[tuple[slice, torch.Tensor, Any]] = deque()  # parts, their buffers, and the events of their ends
        for part in self._chunks(source):
            if len(copies) == len(self._up):
                self._empty(*copies.popleft(), target)
            buffer = self._up.popleft()
            self._up.append(buffer)
            chunk = buffer[: part.stop - part.start]
            copies.append((part, chunk, self._queue.copy(chunk, source[part])))
        while copies:
            self._empty(*copies.popleft(), target)

    def _chunks(self, data: torch.Tensor) -> list[slice]:
        """Cut (n,) bytes into parts that fit a buffer."""
        size = len(self._up[0])
        return [slice(start, min(start + size, len(data))) for start in range(0, len(data), size)]

    def _empty(self, part: slice, chunk: torch.Tensor, done: Any, target: torch.Tensor) -> None:
        """Wait for a copy to a buffer, and empty the buffer into its part of the host tensor."""
        self._queue.wait(done)
        target[part].copy_(chunk)


@lru_cache
def lane_to(device: torch.device) -> Lane | None:
    """The lane of a CUDA device; None of other devices, without pinned memory, and where copies come back wrong."""
    if device.type != "cuda":
        return None
    try:
        lane = Lane(CudaQueue(device))
        return lane if carries(lane, BUFFERS * CHUNK + CHUNK // 2) else None  # every buffer, and one of them twice
    except RuntimeError:
        return None


def carries(lane: Lane, size: int) -> bool:
    """Whether `size` bytes, computed with on the device, come back right: tried once, before anything depends on it."""
    host = torch.arange(251, dtype=torch.uint8).repeat(size // 251 + 1)[:size]  # (size,), no two buffers alike
    back = torch.zeros_like(host)  # (size,)
    lane.settle(lane.deposit(lane.land(lane.fetch(host)) * 3), back)
    return torch.equal(back, host * 3)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, (n,) uint8: a view of a contiguous one, a copy of another."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


class StagedRows:
    """Rows of a host tensor that an accelerator reads, batch after batch, and replaces.

    The next batch is fetched while the present one is in use. Written rows are copied to the host when the next batch
    is written, or when they are read before that.

    Args:
        store: (R, ...) contiguous, in memory or mapped to a file; nothing else may read or write it.
        batch: rows that are usually read at a time.
    """

    def __init__(self, store: torch.Tensor, lane: Lane, batch: int):
        self._store, self._lane, self._batch = store, lane, batch
        self._ahead: tuple[slice, Fetch] | None = None
        self._written: tuple[slice, Deposit] | None = None

    def read(self, rows: slice) -> torch.Tensor:
        """Some rows on the device, (b, ...); the rows behind them, or the first ones, are fetched in the meantime."""
        rows = self._within(rows)
        if self._ahead is not None and self._ahead[0] == rows:
            fetch, self._ahead = self._ahead[1], None
        else:
            fetch = self._fetch(rows)
        there = self._lane.land(fetch)
        start = rows.stop % len(self._store)
        following = self._within(slice(start, start + self._batch))
        if not _overlap(following, rows) and (self._ahead is None or self._ahead[0] != following):
            self._ahead = (following, self._fetch(following))
        return there

    def write(self, rows: slice, states: torch.Tensor) -> None:
        """Replace some rows by (b, ...), which may not be changed afterwards."""
        rows = self._within(rows)
        self._settle()
        if self._ahead is not None and _overlap(self._ahead[0], rows):
            self._ahead = None  # it holds the old values
        self._written = (rows, self._lane.deposit(states.to(self._store.dtype)))

    def _fetch(self, rows: slice) -> Fetch:
        if self._written is not None and _overlap(self._written[0], rows):
            self._settle()
        return self._lane.fetch(self._store[rows])

    def _settle(self) -> None:
        if self._written is not None:
            rows, deposit = self._written
            self._lane.settle(deposit, self._store[rows])
            self._written = None

    def _within(self, rows: slice) -> slice:
        return slice(rows.start, min(rows.stop, len(self._store)))


def _overlap(one: slice, other: slice) -> bool:
    return one.start < other.stop and other.start < one.stop
