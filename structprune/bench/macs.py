"""Multiply-accumulates of whatever a model is made to compute, counted as it runs."""

from contextlib import contextmanager
from typing import Iterator

import torch
from torch import nn

from structprune.models.adapter import Adapter
from structprune.models.modeling_structprune import DiffusionLM


class MacCount:
    """MACs so far: of linears (the LM head included), and of attention's scores and mixture."""

    def __init__(self):
        self.linear = self.attention = 0

    @property
    def total(self) -> int:
        return self.linear + self.attention


@contextmanager
def counted_macs(model: DiffusionLM) -> Iterator[MacCount]:
    """While open, the yielded count grows by what the model runs, be it a forward pass or a generation with a cache.

    Norms, RoPE, softmax and gated products are no products of matrices and are not counted; positions that are not
    run are not either. Nothing is compiled meanwhile: with these hooks in it, it would have to be compiled again once
    they are gone.
    """
    count = MacCount()

    def linear(module, args) -> None:
        count.linear += args[0].numel() // args[0].shape[-1] * module.in_features * module.out_features

    def attention(_, args, result) -> None:  # after it has run, so that a cache's keys are in `args`
        query, key = args[:2]  # (B, H, n, D), (B, K, T, D)
        count.attention += 2 * query.numel() * key.shape[2]

    adapter = Adapter(model)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(linear) for module in linears]
    handles += [block.core.register_forward_hook(attention) for block in adapter.blocks]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield count
    finally:
        for handle in handles:
            handle.remove()
