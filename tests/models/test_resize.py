"""New tokens: embedding, head and config grow together, and what was trained and saved is what is loaded again."""

import json

import pytest
import torch

from structprune import load_model, save_pruned
from structprune.config import ExportSettings

IDS = torch.tensor([[3, 2047, 2050, 9, 2047, 5], [2051, 1, 2, 2047, 4, 2049]])  # (B, T), ids from 2048 are new


@pytest.fixture(params=["llada", "dream"])
def model(request, tiny_model):
    return tiny_model(request.param)


def trained_step(model) -> None:
    """One step of SGD, which changes the rows of new tokens too."""
    rows = model.get_input_embeddings().weight[2048:2052].detach().clone()  # (4, C)
    model.train()
    model(IDS, labels=IDS.flip(1), mask_probability=torch.full((2,), 0.5)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model.eval()
    assert not torch.equal(rows, model.get_input_embeddings().weight[2048:2052])


@pytest.mark.parametrize("options, rows", [
    ({}, 2052), ({"mean_resizing": False}, 2052), ({"pad_to_multiple_of": 64}, 2112),
    ({"pad_to_multiple_of": 64, "mean_resizing": False}, 2112),
])  # fmt: skip
def test_new_tokens_are_trained_saved_and_loaded(model, tmp_path, options, rows):
    with torch.no_grad():
        before = model(IDS.clamp(max=2047)).logits  # (B, T, V)
        embedding = model.resize_token_embeddings(2052, **options)
        after = model(IDS.clamp(max=2047)).logits  # (B, T, V')
    assert embedding is model.get_input_embeddings() is model.embedding
    assert model.get_output_embeddings() is model.output_head
    assert embedding.weight.shape[0] == model.output_head.weight.shape[0] == after.shape[-1] == rows
    assert model.config.vocab_size == getattr(model.config, "embedding_size", rows) == rows
    assert (after[..., :2048] - before).abs().max() < 1e-6
    trained_step(model)
    with torch.no_grad():
        expected = model(IDS).logits  # (B, T, V')
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)
        assert torch.equal(load_model(tmp_path / "saved")(IDS).logits, expected)


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
@pytest.mark.parametrize("compat", ["free", "official"])
def test_pruned_output_of_a_resized_model(tiny_checkpoint, tmp_path, family, compat):
    model = load_model(tiny_checkpoint(family))
    model.resize_token_embeddings(2060)
    out = save_pruned(model, tmp_path / "out", ExportSettings(compat=compat))
    values = json.loads((out / "config.json").read_text())
    assert values["vocab_size"] == 2060 and values.get("embedding_size", 2060) == 2060
    with torch.no_grad():
        assert torch.equal(load_model(out)(IDS).logits, model(IDS).logits)


def test_the_head_of_a_model_with_biases(tiny_model):
    model = tiny_model("llada", include_bias=True)
    bias = model.output_head.bias.detach().clone()  # (V,)
    model.resize_token_embeddings(2050)
    assert model.output_head.bias.shape == (2050,) and torch.equal(model.output_head.bias[:2048], bias)


def test_rows_beyond_the_mask_token_may_go(model):
    model.config.mask_token_id = 2000
    model.resize_token_embeddings(2001)
    assert model(IDS.clamp(max=2000)).logits.shape[-1] == model.config.vocab_size == 2001
    with pytest.raises(ValueError, match="^2000 tokens would leave out the mask token, 2000: resize to 2001 or more$"):
        model.resize_token_embeddings(2000)
    model.resize_token_embeddings(1990, pad_to_multiple_of=67)  # 2010
    assert model.embedding.weight.shape[0] == model.output_head.weight.shape[0] == 2010


def test_nothing_asked_changes_nothing(model):
    weight = model.embedding.weight
    assert model.resize_token_embeddings() is model.embedding and model.embedding.weight is weight
    model.resize_token_embeddings(pad_to_multiple_of=100)
    assert model.config.vocab_size == model.output_head.weight.shape[0] == 2100


def test_modules_can_be_replaced(model):
    embedding, head = torch.nn.Embedding(2100, 32), torch.nn.Linear(32, 2100, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.embedding is embedding and model.output_head is head
    assert getattr(model.config, "embedding_size", model.config.vocab_size) == 2100
    assert model(IDS).logits.shape == (2, 6, 2100)
