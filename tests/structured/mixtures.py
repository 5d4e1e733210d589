"""What tests of mixtures of experts share."""

import random

import torch

SIZE = 16  # channels of an expert
IDS = torch.randint(0, 2048, (2, 11), generator=torch.Generator().manual_seed(0))
SMALL = {
    "calibration.windows": 3, "calibration.held_out": 2, "calibration.length": 16, "calibration.interval": 25,
    "structured.split_candidates": 2, "structured.split_windows": 2,
}  # fmt: skip


def drawn_channels(draw: random.Random, experts: list[int]) -> tuple[int, ...]:
    """As many channels of each of these experts, numbered over all experts."""
    count = draw.randint(1, SIZE - 1)
    return tuple(expert * SIZE + each for expert in experts for each in sorted(draw.sample(range(SIZE), count)))
