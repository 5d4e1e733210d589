"""How much of a run is spent in a model's forward passes."""

import time
from contextlib import ExitStack, contextmanager
from typing import Iterator
from unittest.mock import patch

import torch
from torch import nn

from structprune.models import modeling_structprune as modeling
from structprune.models.placement import synchronise

LAYERS = (nn.Linear, nn.Embedding, modeling.RMSNorm, modeling.AttentionCore)


class ForwardClock:
    """Seconds spent so far in linears, embeddings, norms, attention and RoPE, hooks on them excluded.

    The products of gated MLPs and residual sums are not among them, so that a share of a run is at least what is found.
    """

    def __init__(self, device: torch.device):
        self.seconds, self._device = 0.0, device

    @contextmanager
    def running(self) -> Iterator["ForwardClock"]:
        """Count while open."""
        with ExitStack() as stack:
            for layer in LAYERS:
                stack.enter_context(patch.object(layer, "forward", self._timed(layer.forward)))
            stack.enter_context(patch.object(modeling, "rotate", self._timed(modeling.rotate)))
            yield self

    def _timed(self, function):
        def timed(*args, **kwargs):
            synchronise(self._device)
            start = time.perf_counter()
            found = function(*args, **kwargs)
            synchronise(self._device)
            self.seconds += time.perf_counter() - start
            return found

        return timed
