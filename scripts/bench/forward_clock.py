"""How much of a run is spent in a model's forward passes."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn

from structprune.models import modeling_structprune as modeling

LAYERS = (nn.Linear, nn.Embedding, modeling.RMSNorm, modeling.AttentionCore)


class ForwardClock:
    """Seconds spent so far in linears, embeddings, norms, attention and RoPE, hooks on them excluded.

    The products of gated MLPs and residual sums are not among them, so that a share of a run is at least what is found.
    On CUDA layers are timed between events on the stream: the host waits for none, so that the run takes no longer and
    its copies overlap as ever.
    """

    def __init__(self, device: torch.device):
        self._seconds, self._device = 0.0, device
        self._open: deque = deque()  # pairs of events whose end has not been seen yet

    @property
    def seconds(self) -> float:
        """Of all layers called so far; waits for them."""
        while self._open:
            self._open[0][1].synchronize()
            self._close()
        return self._seconds

    @contextmanager
    def running(self) -> Iterator["ForwardClock"]:
        """Count while open."""
        with ExitStack() as stack:
            for layer in LAYERS:
                stack.enter_context(patch.object(layer, "forward", self._timed(layer.forward)))
            stack.enter_context(patch.object(modeling, "rotate", self._timed(modeling.rotate)))
            yield self

    def _close(self) -> None:
        """Add up the oldest pairs, as far as they have ended."""
        while self._open and self._open[0][1].query():
            start, end = self._open.popleft()
            self._seconds += start.elapsed_time(end) / 1e3

    def _timed(self, function):
        return self._between_events(function) if self._device.type == "cuda" else self._by_the_clock(function)

    def _by_the_clock(self, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            found = function(*args, **kwargs)
            self._seconds += time.perf_counter() - start
            return found

        return timed

    def _between_events(self, function):
        def timed(*args, **kwargs):
            stream = torch.cuda.current_stream(self._device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            found = function(*args, **kwargs)
            end.record(stream)
            self._open.append((start, end))
            self._close()
            return found

        return timed
