"""Which code computes attention: SDPA unless `eager` is chosen, the same result by both, and nothing else."""

import pytest
import torch

from structprune.models.layers_structprune import AttentionCore, plain_attention
from tests.tiny_values import GRAPHS

IDS = torch.randint(0, 2047, (2, 9), generator=torch.Generator().manual_seed(2))  # (B, T)
REAL = torch.ones(2, 9, dtype=torch.bool)  # (B, T)
REAL[0, :3] = False
BAND = (torch.arange(9)[:, None] - torch.arange(9)).abs()[None, None] < 4  # (1, 1, T, T)


@pytest.fixture
def counted(monkeypatch):
    """Counts the calls of `plain_attention`."""
    calls = []

    def plain(*arguments):
        calls.append(len(arguments))
        return plain_attention(*arguments)

    monkeypatch.setattr("structprune.models.layers_structprune.plain_attention", plain)
    return calls


@pytest.mark.parametrize("family", GRAPHS)
@pytest.mark.parametrize("mask", [None, REAL, BAND, torch.where(BAND, torch.linspace(0, 1, 9), -1e9)])
def test_eager_attention_gives_what_sdpa_gives(tiny_model, counted, family, mask):
    model = tiny_model(family)
    results = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(IDS, mask).logits  # (B, T, V)
        logits.square().mean().backward()
        results[name] = logits.detach(), model.embedding.weight.grad.clone()  # (B, T, V), (V, C)
    assert len(counted) == len(model.blocks)  # in the second pass only
    for sdpa, eager in zip(results["sdpa"], results["eager"]):
        assert (sdpa - eager).abs().max() < 1e-5 and sdpa.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_attends_to_nothing_gets_zeros(dtype):
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)  # (B, H, T, D)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 2, :] = False
    for each in (mask, torch.zeros(1, 1, 5, 5, dtype=dtype).masked_fill(~mask, -torch.inf)):
        plain, sdpa = plain_attention(query, key, value, each), AttentionCore()(query, key, value, each)
        assert (plain[:, :, 2] == 0).all() and plain.dtype == dtype
        assert (plain - sdpa).abs().max() < (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("family", GRAPHS)
def test_the_choice_at_loading(tiny_model, tmp_path, counted, family):
    model = tiny_model(family)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits  # (B, T, V)
        for name in ("sdpa", "eager"):
            again = type(model).from_pretrained(tmp_path, attn_implementation=name).eval()
            difference = (again(IDS).logits - expected).abs().max()
            assert difference == 0 if name == "sdpa" else 0 < difference < 1e-5
    assert len(counted) == len(model.blocks)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", "spda"])
def test_other_implementations_are_refused_in_one_line(tiny_model, tmp_path, name):
    model = tiny_model("llada")
    model.save_pretrained(tmp_path)
    said = f"attn_implementation = '{name}' is not available for this model: use 'sdpa' or 'eager'"
    with pytest.raises(ValueError) as at_loading:
        type(model).from_pretrained(tmp_path, attn_implementation=name)
    with pytest.raises(ValueError) as later:
        model.set_attn_implementation(name)
    assert str(at_loading.value) == str(later.value) == said
    assert model.config._attn_implementation == "sdpa"
