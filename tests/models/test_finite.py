"""Numbers that are finite, wherever the others lie and whatever their dtype."""

import math

import pytest
import torch

from structprune.models.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 31, 32, 1000])  # in vectors of the CPU, and behind them
def test_one_number_that_is_not_finite_is_seen(dtype, place):
    numbers = torch.linspace(-3, 3, 1001, dtype=dtype)
    assert all_finite(numbers) and all_finite(numbers.view(7, 143))
    for odd in (math.nan, math.inf, -math.inf):
        changed = numbers.clone()
        changed[place] = odd
        assert not all_finite(changed) and not all_finite(changed.view(7, 143).T)


def test_the_largest_numbers_are_finite():
    limits = torch.finfo(torch.bfloat16)
    assert all_finite(torch.tensor([limits.min, limits.max], dtype=torch.bfloat16)) and all_finite(torch.zeros(0))
