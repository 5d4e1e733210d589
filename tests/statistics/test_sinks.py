"""Attention mass and sink masks: against full matrices, by hand, and against the published implementation."""

import math

import pytest
import torch
from safetensors.torch import load_file

from structprune.config import SinkSettings
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.statistics.capture import MassMeter
from structprune.statistics.sinks import attention_mass, keep_weights, sink_mask, sink_threshold


def queries_and_keys(heads: int = 4, kv_heads: int = 4, length: int = 13):
    generator = torch.Generator().manual_seed(heads + kv_heads)
    query = 2 * torch.randn(3, heads, length, 8, generator=generator)  # (B, H, T, D)
    return query, torch.randn(3, kv_heads, length, 8, generator=generator)  # (B, K, T, D)


def full_matrix_mass(query, key):
    """The definition, with the whole (T, T) matrix."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # (B, H, T, D)
    attention = torch.softmax(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5, dim=-1)  # (B, H, T, T)
    return attention.sum(dim=(1, 2))  # (B, T)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_mass_is_the_column_sum_of_attention(kv_heads):
    query, key = queries_and_keys(4, kv_heads)
    mass = attention_mass(query, key)
    assert torch.allclose(mass, full_matrix_mass(query, key), rtol=1e-5)
    assert torch.allclose(mass.sum(1), torch.full((3,), 4.0 * 13), rtol=1e-5)


@pytest.mark.parametrize("tile", [1, 2, 5, 12, 13, 1000])
def test_mass_does_not_depend_on_the_tile(tile):
    query, key = queries_and_keys(4, 2)
    assert torch.allclose(attention_mass(query, key, tile=tile), full_matrix_mass(query, key), rtol=1e-5)


def test_mass_by_hand():
    # one head, D = 1: both queries score log 3 on key 0 and 0 on key 1, so they give it 3/4 and 1/4
    query = torch.full((1, 1, 2, 1), math.log(3))
    key = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    assert torch.allclose(attention_mass(query, key), torch.tensor([[1.5, 0.5]]))


def test_mass_is_fp32_also_from_half_precision():
    query, key = queries_and_keys()
    mass = attention_mass(query.bfloat16(), key.bfloat16())
    assert mass.dtype == torch.float32
    assert torch.allclose(mass, full_matrix_mass(query.bfloat16().float(), key.bfloat16().float()), rtol=1e-5)


def test_soft_mask_by_hand():
    mass = torch.tensor([[0.0, 0.0, 0.0, 4.0]])  # mean 1, population std sqrt(3)
    assert torch.allclose(sink_threshold(mass, 2.0), torch.tensor([[1 + 2 * math.sqrt(3)]]))
    low, high = (1 / (1 + math.exp(-0.5 * (m - 1 - math.sqrt(3)))) for m in (0.0, 4.0))
    assert torch.allclose(sink_mask(mass, alpha=0.5, kappa=1.0), torch.tensor([[low, low, low, high]]))
    settings = SinkSettings(alpha=0.5, kappa=1.0)
    assert torch.allclose(keep_weights(mass, settings), torch.tensor([[1 - low, 1 - low, 1 - low, 1 - high]]))


def test_hard_weights_keep_up_to_the_threshold():
    mass = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 4.0]])  # mean 1 both, std 1 and sqrt(3)
    weights = keep_weights(mass, SinkSettings(mask="hard", kappa=1.0))  # row 0's threshold is 2 exactly: it stays
    assert weights.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_scale_free_mask_ignores_how_many_heads_and_layers_there_are():
    mass = torch.tensor([[1.0, 2.0, 3.0, 10.0]])
    assert torch.allclose(sink_mask(mass, scale_free=True), sink_mask(mass / 4))  # the mean is 4
    assert torch.allclose(sink_mask(1024 * mass, scale_free=True), sink_mask(mass, scale_free=True), atol=1e-6)
    assert not torch.allclose(sink_mask(1024 * mass), sink_mask(mass), atol=1e-3)


@pytest.mark.parametrize("case", ["sink_wanda_50", "sink_sparsegpt_50"])
@torch.inference_mode()
@pytest.mark.parametrize("parity", ["llada", "dream"], indirect=True)
def test_mass_and_mask_equal_the_published_ones(parity, case):
    model, expected = load_model(parity), load_file(parity / "expected.safetensors")
    with (meter := MassMeter()).on(Adapter(model).cores):
        model.encode(expected[f"{case}/noisy_ids"])
    mass = meter.take()  # (N * S, T)
    assert torch.allclose(mass, expected[f"{case}/attention_mass"], rtol=1e-4, atol=0)
    assert torch.allclose(sink_mask(mass), expected[f"{case}/sink_mask"], atol=1e-4)
    assert (expected[f"{case}/sink_mask"] > 0.5).any()  # there are sinks to be found
