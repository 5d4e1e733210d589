"""The time that a run spends in a model's forward passes."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn

from structprune.models import layers_structprune as layers

LAYERS = (nn.Linear, nn.Embedding, layers.RMSNorm, layers.AttentionCore)


class ForwardClock:
    """Seconds spent so far in linears, embeddings, norms, attention and RoPE, without hooks on them.

    Products of gated MLPs and residual sums are not counted, so the share of a run is a lower bound. On CUDA, layers
    are timed between events on the stream without a device sync, so that the run is not slowed down and copies overlap
    as usual.
    """

    def __init__(self, device: torch.device):
        self._seconds, self._device = 0.0, device
        self._pending: deque = deque()  # pairs of events that may not have ended yet

    @property
    def seconds(self) -> float:
        """For all layers called so far; waits for them."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._collect()
        return self._seconds

    @contextmanager
    def running(self) -> Iterator["ForwardClock"]:
        """While open, count."""
        with ExitStack() as stack:
            for layer in LAYERS:
                stack.enter_context(patch.object(layer, "forward", self._timed(layer.forward)))
            stack.enter_context(patch.object(layers, "rotate", self._timed(layers.rotate)))
            yield self

    def _collect(self) -> None:
        """Add the oldest pairs that have ended."""
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self._seconds += start.elapsed_time(end) / 1e3

    def _timed(self, function):
        return self._between_events(function) if self._device.type == "cuda" else self._by_the_clock(function)

    def _by_the_clock(self, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self._seconds += time.perf_counter() - start
            return result

        return timed

    def _between_events(self, function):
        def timed(*args, **kwargs):
            stream = torch.cuda.current_stream(self._device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            result = function(*args, **kwargs)
            end.record(stream)
            self._pending.append((start, end))
            self._collect()
            return result

        return timed
