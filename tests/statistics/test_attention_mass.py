"""Every way of cutting the attention mass into blocks gives the full matrix's answer."""

import math

import pytest
import torch

from structprune.statistics import sinks


def full_matrix(query, key):
    """(B, H, T, D), (B, K, T, D) -> (B, T) in fp64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # (B, H, T, D)
    scores = query.double() @ key.transpose(2, 3) / math.sqrt(query.shape[-1])  # (B, H, T, T)
    return scores.softmax(-1).sum(dim=(1, 2))  # (B, T)


def make(batch, heads, kv_heads, length, size):
    generator = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(batch, length, heads, size, generator=generator)  # (B, T, H, D)
    key = torch.randn(batch, length, kv_heads, size, generator=generator)  # (B, T, K, D)
    return query.transpose(1, 2), key.transpose(1, 2)  # strided as a model's


@pytest.mark.parametrize(
    ("rows", "expected"),  # rows of scores that fit, of 5 sequences x 4 key heads x 2 query heads each x 9 queries
    [
        (1, (1, 1, 1)),  # not even one query of both heads: one all the same
        (7, (3, 1, 1)),  # 3 queries x 2 heads
        (18, (9, 1, 1)),  # one key head whole
        (40, (9, 2, 1)),  # two
        (72, (9, 4, 1)),  # one sequence whole
        (150, (9, 4, 2)),  # two
        (10_000, (9, 4, 5)),  # everything
    ],
)
def test_blocks_grow_from_queries_to_heads_to_sequences(monkeypatch, rows, expected):
    monkeypatch.setitem(sinks.TILE_BYTES, "cpu", 4 * 9 * rows)
    assert sinks._block_shape(5, 4, 2, 9, None, torch.device("cpu")) == expected
    query, key = make(5, 8, 4, 9, 6)
    assert torch.allclose(sinks.attention_mass(query, key), full_matrix(query, key).float(), rtol=1e-5)


@pytest.mark.parametrize("tile", [1, 4, 9, 100])
def test_given_tile_is_taken(tile):
    query, key = make(3, 4, 2, 9, 6)
    assert torch.allclose(sinks.attention_mass(query, key, tile), full_matrix(query, key).float(), rtol=1e-5)


def test_mass_is_no_part_of_the_gradient():
    query, key = make(1, 2, 2, 5, 4)
    assert not sinks.attention_mass(query.requires_grad_(), key).requires_grad


def test_memory_stays_at_two_blocks(monkeypatch):
    """No buffer grows with T²: the largest tensor allocated is the pair of blocks."""
    sizes = []
    empty = torch.empty

    def watch(*shape, **options):
        buffer = empty(*shape, **options)
        sizes.append(buffer.nbytes)
        return buffer

    monkeypatch.setattr(torch, "empty", watch)
    monkeypatch.setitem(sinks.TILE_BYTES, "cpu", 2**16)
    sinks.attention_mass(*make(2, 4, 4, 512, 4))
    assert sizes and max(sizes) <= 2 * 2**16 < 4 * 512 * 512


@pytest.mark.parametrize("tile_bytes", [4, 4 * 7 * 3, 2**22])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_attention_and_mass_from_one_pass(heads, kv_heads, tile_bytes, monkeypatch):
    monkeypatch.setattr(sinks, "TILE_BYTES", {"cpu": tile_bytes})
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(2, heads, 7, 4, generator=generator)
    key, value = (torch.randn(2, kv_heads, 7, 4, generator=generator) for _ in range(2))
    mixed, mass = sinks.attend_with_mass(query, key, value)
    repeated = (side.repeat_interleave(heads // kv_heads, dim=1) for side in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated)
    assert torch.allclose(mixed, expected, atol=1e-6) and mixed.dtype == torch.float32
    assert torch.allclose(mass, sinks.head_mass(query, key), rtol=1e-5)
    assert sinks.attend_with_mass(query.bfloat16(), key.bfloat16(), value.bfloat16())[0].dtype == torch.bfloat16


def full_heads(query, key, hidden):
    """(B, H, Q, D), (B, K, T, D) and what no query sees (.., Q, T) -> (B, H, T) in fp64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # (B, H, T, D)
    scores = query.double() @ key.transpose(2, 3) / math.sqrt(query.shape[-1])  # (B, H, Q, T)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).sum(2).float()


@pytest.mark.parametrize("rows", [1, 7, 18, 40, 10_000])
@pytest.mark.parametrize("last", [9, 4, 1])
def test_heads_of_a_causal_model_also_for_its_last_queries(monkeypatch, rows, last):
    monkeypatch.setitem(sinks.TILE_BYTES, "cpu", 4 * 9 * rows)
    query, key = make(3, 4, 2, 9, 6)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)[-last:]  # (Q, T)
    mass = sinks.head_mass(query[:, :, -last:], key, causal=True)
    assert torch.allclose(mass, full_heads(query[:, :, -last:], key, hidden), rtol=1e-5, atol=1e-7)
    assert torch.allclose(mass.sum(-1), torch.full((3, 4), float(last)))


@pytest.mark.parametrize("shape", [(1, 1, 9, 9), (3, 1, 1, 9), (3, 4, 9, 9)])
def test_heads_under_a_mask(monkeypatch, shape):
    monkeypatch.setitem(sinks.TILE_BYTES, "cpu", 4 * 9 * 7)
    query, key = make(3, 4, 2, 9, 6)
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    seen[..., 0] = True
    expected = full_heads(query, key, ~seen)
    assert torch.allclose(sinks.head_mass(query, key, mask=seen), expected, rtol=1e-5, atol=1e-7)
    added = torch.zeros(shape).masked_fill(~seen, -torch.inf)
    assert torch.allclose(sinks.head_mass(query, key, mask=added), expected, rtol=1e-5, atol=1e-7)


def test_scale_of_the_scores():
    query, key = make(2, 2, 2, 5, 4)
    assert torch.allclose(sinks.head_mass(query / 3, key, scale=1.5), sinks.head_mass(query, key), rtol=1e-5)
