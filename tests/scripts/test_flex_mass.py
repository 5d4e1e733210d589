"""Attention mass by FlexAttention equals the tiled one and SDPA, for every kind of head sharing."""

import pytest
import torch
import torch.nn.functional as F

from scripts.gpu.flex_mass import attend_with_flex_mass
from structprune.statistics.sinks import attention_mass

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [16, 37])
def test_mass_and_output_are_those_of_the_reference(heads, kv_heads, length):
    generator = torch.Generator().manual_seed(length)
    query = 3 * torch.randn(2, heads, length, 16, generator=generator)
    key, value = (torch.randn(2, kv_heads, length, 16, generator=generator) for _ in range(2))
    mixed, mass = attend_with_flex_mass(query, key, value)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass, attention_mass(query, key), rtol=1e-5, atol=1e-5)
    assert mass.dtype == torch.float32 and mass.sum(1).tolist() == pytest.approx([heads * length] * 2, rel=1e-5)


def test_a_sink_by_hand():
    """One head, two positions, scores (0, 0) and (log 3, 0): weights (1/2, 1/2) and (3/4, 1/4)."""
    query = torch.tensor([[0.0], [1.0]])[None, None]  # (1, 1, 2, 1)
    key = torch.tensor([[3.0], [1.0]]).log()[None, None]  # (1, 1, 2, 1)
    _, mass = attend_with_flex_mass(query, key, key)
    assert mass.tolist() == [pytest.approx([1.25, 0.75])]


def test_bfloat16_inputs_give_fp32_mass():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 24, 16, generator=generator).bfloat16() for _ in range(2))
    mixed, mass = attend_with_flex_mass(query, key, key)
    assert mixed.dtype == torch.bfloat16 and mass.dtype == torch.float32
    torch.testing.assert_close(mass, attention_mass(query, key), rtol=2e-2, atol=2e-2)
