"""Numbers too small for fp32's full precision, which CPUs multiply ten to a hundred times slower than others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TINY = 1e-39  # a denormal number of fp32


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """While open, CPUs that can do it compute with 0 for denormal numbers, so that a gradient full of them is no
    slower than another.

    It holds for this thread, and for torch's worker threads if none of them has worked yet: they take the setting of
    the thread that starts them, and keep it. So commands open this before anything is computed.
    """
    before = flushing()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def flushing() -> bool:
    """Whether this thread computes with 0 for denormal numbers; torch does not tell."""
    return not bool(torch.full((), TINY) * 1.0)
