"""Copies between host and accelerator that overlap with computation.

All of them go through a few small pinned buffers. Weights and hidden states stay in pageable memory or in a mapped
file, so that pinned memory does not grow with the model.
"""

from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

CHUNK = 2**26  # bytes of a pinned buffer
BUFFERS = 2  # of each direction: the host fills or empties one while the other is copied
PINNED_BYTES = 2 * BUFFERS * CHUNK  # of a `Lane`


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small host tensor to a device without a device sync, which copies from pageable memory cause."""
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


class Pending(NamedTuple):
    """A device tensor that may not be used before `event`."""

    tensor: torch.Tensor
    event: Any


class Lane:
    """Both directions of copies of one accelerator, over a queue of copies (`CudaQueue`, or a stand-in in tests)."""

    def __init__(self, queue: Any):
        self._queue = queue
        half = len(queue.buffers) // 2
        self._down = deque((buffer, None) for buffer in queue.buffers[:half])  # to the device, oldest use first
        self._up = deque(queue.buffers[half:])

    def fetch(self, host: torch.Tensor) -> Pending:
        """Begin to copy a host tensor, which may change once this returns, to the device; `land` ends it."""
        copy, done = self._queue.empty(host.shape, host.dtype), None
        for source, target in self._parts(host, copy):
            buffer, last_use = self._down.popleft()
            if last_use is not None:
                self._queue.wait(last_use)  # before it is overwritten
            chunk = buffer[: len(source)]
            chunk.copy_(source)
            done = self._queue.copy(target, chunk)
            self._down.append((buffer, done))
        return Pending(copy, done)

    def land(self, fetch: Pending) -> torch.Tensor:
        """The fetched tensor, which later computation may use."""
        self._queue.compute_after(fetch.event, fetch.tensor)
        return fetch.tensor

    def deposit(self, tensor: torch.Tensor) -> Pending:
        """A device tensor, as the computation queued so far leaves it; it may not be changed before `settle`."""
        return Pending(tensor.contiguous(), self._queue.computed())

    def settle(self, deposit: Pending, host: torch.Tensor) -> None:
        """Copy a deposit to a host tensor of its shape and dtype; returns when it is complete.

        The host waits for the computation that was queued when the deposit was made, not for later work.
        """
        self._queue.copy_after(deposit.event)
        copies: deque[tuple[torch.Tensor, torch.Tensor, Any]] = deque()  # host parts, their buffers, ends of the copies
        for source, target in self._parts(deposit.tensor, host):
            if len(copies) == len(self._up):
                self._empty(*copies.popleft())
            chunk = self._up[0][: len(source)]
            self._up.rotate(-1)
            copies.append((target, chunk, self._queue.copy(chunk, source)))
        for copy in copies:
            self._empty(*copy)

    def _parts(self, source: torch.Tensor, target: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Views of the bytes of both, (n,) uint8 each, that fit a buffer; one empty pair of empty tensors."""
        size = len(self._up[0])
        return zip(_bytes(source).split(size), _bytes(target).split(size), strict=True)

    def _empty(self, target: torch.Tensor, chunk: torch.Tensor, done: Any) -> None:
        """Wait for a copy to a buffer, and empty the buffer into the host's part."""
        self._queue.wait(done)
        target.copy_(chunk)


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
        self._ahead: tuple[slice, Pending] | None = None
        self._written: tuple[slice, Pending] | None = None

    def read(self, rows: slice) -> torch.Tensor:
        """Some rows on the device, (b, ...); the rows behind them, or the first ones, are fetched in the meantime."""
        rows = self._within(rows)
        if self._ahead is not None and self._ahead[0] == rows:
            fetch, self._ahead = self._ahead[1], None
        else:
            fetch = self._fetch(rows)
        states = self._lane.land(fetch)
        start = rows.stop % len(self._store)
        following = self._within(slice(start, start + self._batch))
        if not _overlap(following, rows) and (self._ahead is None or self._ahead[0] != following):
            self._ahead = (following, self._fetch(following))
        return states

    def write(self, rows: slice, states: torch.Tensor) -> None:
        """Replace some rows by (b, ...), which may not be changed afterwards."""
        rows = self._within(rows)
        self._settle()
        if self._ahead is not None and _overlap(self._ahead[0], rows):
            self._ahead = None  # it holds the old values
        self._written = (rows, self._lane.deposit(states.to(self._store.dtype)))

    def _fetch(self, rows: slice) -> Pending:
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
