"""Three windows at two noise levels."""

import pytest
import torch

from structprune.calibration.batches import Calibration

MASK, LENGTH = 2047, 12


@pytest.fixture
def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 90, (3, LENGTH), generator=generator)
    p = torch.tensor([[0.3, 0.6], [0.4, 0.7], [0.2, 0.9]])  # (N, S)
    noisy = ids[:, None].repeat(1, 2, 1)  # (N, S, T)
    noisy[torch.rand(noisy.shape, generator=generator) < p[..., None]] = MASK
    return Calibration(ids, noisy, p, {}, held_out=0)
