"""Blocks of made-up sizes, and paths of random costs through them."""

import pytest
import torch

from structprune.structured.paths import RemovalPath
from structprune.structured.sizes import BlockSize


@pytest.fixture
def toy() -> list[BlockSize]:
    """Three blocks of 4 heads, 4 D C = 4 * 100 each, and 64 channels, 3 C = 30 each."""
    total, step, steps = 4 * 400 + 64 * 30, {"attention": 400, "channels": 30}, {"attention": 4, "channels": 64}
    whole = {"attention": 1600, "channels": 64 * 30}
    return [BlockSize(index, total, step, steps, whole) for index in range(3)]


@pytest.fixture
def random_paths():
    """`random_paths(sizes, seed=0, rank=False)` -> paths of rising random cost: steps are numbered, one unit each."""

    def make(sizes: list[BlockSize], seed: int = 0, rank: bool = False) -> dict:
        generator, paths = torch.Generator().manual_seed(seed), {}
        for size in sizes:
            for kind in size.step:
                steps = size.steps[kind]
                cost = torch.rand(steps, generator=generator, dtype=torch.float64).cumsum(0) * size.step[kind]
                order = torch.randn(steps, generator=generator, dtype=torch.float64).sort().values if rank else None
                paths[size.index, kind] = RemovalPath(tuple((step,) for step in range(steps)), cost, order)
        return paths

    return make
