"""MACs counted as they run, against counts by hand."""

import pytest
import torch

from structprune.bench.macs import counted_macs
from structprune.generation.generate import Options, generate
from structprune.generation.samplers import LLaDAGeneration
from structprune.models.adapter import Adapter
from structprune.structured.sizes import forward_macs

# tests/conftest.py: C = 32, 3 blocks, V = 2048; LLaDA 4 heads of 8, MLP 48
LLADA_BLOCK = 4 * 32 * 32 + 3 * 32 * 48
HEAD = 32 * 2048


@torch.no_grad()
def test_a_forward_pass_by_hand(tiny_model):
    with counted_macs(tiny_model()) as count:
        pass
    assert count.total == 0
    model = tiny_model()
    with counted_macs(model) as count:
        model(torch.arange(20).view(2, 10))
    assert count.linear == 20 * (3 * LLADA_BLOCK + HEAD)
    assert count.attention == 2 * 3 * (2 * 32 * 10 * 10)  # per sequence and block: scores and mixture, H*D wide
    assert count.total == count.linear + count.attention


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
@torch.no_grad()
def test_the_count_is_what_inspect_predicts(tiny_model, family):
    model = tiny_model(family)
    with counted_macs(model) as count:
        model(torch.arange(24).view(2, 12))
    assert count.total == 2 * forward_macs(Adapter(model), 12)


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
@torch.no_grad()
def test_what_a_block_lacks_does_not_count(tiny_model, gaps, family):
    model, whole = tiny_model(family, **gaps(family)), tiny_model(family)
    counts = []
    for each in (model, whole):
        with counted_macs(each) as count:
            each(torch.arange(24).view(2, 12))
        assert count.total == 2 * forward_macs(Adapter(each), 12)
        counts.append(count)
    gapped, full = counts
    assert gapped.attention * 3 == full.attention * 2  # two blocks with attention, of three
    assert gapped.linear - 24 * HEAD == (full.linear - 24 * HEAD) * 2 // 3


def blocks_at(positions: int, last: int) -> int:
    """Linear MACs of `positions` in all blocks, the last of which is computed at `last` of them."""
    return positions * 3 * LLADA_BLOCK - (positions - last) * (32 * 32 + 3 * 32 * 48)


def test_a_generation_counts_the_head_where_it_runs_and_a_cache_what_it_leaves(tiny_model):
    """A prompt of 6, two blocks of 2 in two steps each: masks predicted are 2 and 1, and again."""
    model, prompt, settings = tiny_model(), torch.arange(6)[None], LLaDAGeneration(4, 4, 2)
    for cache, positions in (("none", [10, 10, 10, 10]), ("prefix", [10, 4, 10, 2]), ("dual", [10, 2, 10, 2])):
        with counted_macs(model) as count:
            generate(model, prompt, settings, options=Options(cache=cache))
        lasts = [2, 1, 2, 1]
        linear = sum(blocks_at(n, m) for n, m in zip(positions, lasts)) + HEAD * sum(lasts)
        assert count.linear == linear, cache
        assert count.attention == 3 * sum(2 * 32 * n * 10 for n in positions), cache


def test_nothing_is_counted_afterwards(tiny_model):
    model = tiny_model()
    with counted_macs(model) as count:
        pass
    with torch.no_grad():
        model(torch.arange(4)[None])
    assert count.total == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
