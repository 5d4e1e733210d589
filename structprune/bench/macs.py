"""Multiply-accumulates (MACs), counted while a model runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from structprune.models.adapter import Adapter
from structprune.models.modeling_structprune import DiffusionLM


class MacCount:
    """MACs so far: of linears (including the LM head), and of attention's two products."""

    def __init__(self):
        self.linear = self.attention = 0

    @property
    def total(self) -> int:
        return self.linear + self.attention


@contextmanager
def counted_macs(model: DiffusionLM) -> Iterator[MacCount]:
    """While open, the yielded count grows by all that the model runs, a forward pass or a generation with a cache.

    Only matrix products count, not norms, RoPE, softmax and gated products, and only at positions that are computed.
    Nothing is compiled meanwhile: code compiled with these hooks would have to be compiled again without them.
    """
    count = MacCount()

    def linear(module, args) -> None:
        count.linear += args[0].numel() // args[0].shape[-1] * module.in_features * module.out_features

    def attention(_, args, result) -> None:  # a hook after the call, which sees the keys of a cache
        query, key = args[:2]  # (B, H, n, D), (B, K, T, D)
        count.attention += 2 * query.numel() * key.shape[2]

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(linear) for module in linears]
    handles += [core.register_forward_hook(attention) for core in Adapter(model).cores]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield count
    finally:
        for handle in handles:
            handle.remove()
