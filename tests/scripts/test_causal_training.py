"""scripts/studies/causal_training.py: mask rates, noise, what is trained and the merge, computed independently."""

import pytest
import torch
from torch import nn

from structprune.models.family import ROLES

MASK_ID = 2047
LINEARS = 3 * len(ROLES)  # of the tiny model


@pytest.fixture
def training(scripts):
    return scripts("causal_training")


@pytest.fixture
def adapted(training, tiny_model):
    """(PEFT's wrapper, the model in it): a tiny Dream with adapters that do something."""
    model = tiny_model("dream").requires_grad_(False)
    wrapper = training.add_adapters(model, 4, 8, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapper, model


def test_the_highest_rate_grows_to_one(training):
    rates = [training.highest_rate(progress, 0.4, 0.5) for progress in (0, 0.25, 0.5, 0.9)]
    assert rates == pytest.approx([0.4, 0.7, 1.0, 1.0])
    assert training.highest_rate(0.0, 0.4, 0.0) == 1.0


def test_noise_has_the_drawn_rates_and_spares_the_edges(training):
    generator = torch.Generator().manual_seed(0)
    clean, noisy, rate = training.draw_batch(torch.arange(4000), (4, 2000), (0.2, 0.6), MASK_ID + 9999, generator)
    masked = noisy == MASK_ID + 9999  # (B, T)
    assert torch.equal(noisy[~masked], clean[~masked]) and not masked[:, [0, -1]].any()
    assert masked.float().mean(1).tolist() == pytest.approx(rate.tolist(), abs=0.04)
    low, *others = sorted(rate.tolist())
    assert 0.2 <= low < 0.3 and [other - low for other in others] == pytest.approx([0.1, 0.2, 0.3])


def test_adapters_norms_and_the_mask_row_are_trained_and_nothing_else(training, tiny_model):
    model = tiny_model("dream").requires_grad_(False)
    ids = torch.arange(2 * 12).view(2, 12)  # (B, T)
    ids[0, 3] = MASK_ID
    before = model(ids).logits  # (B, T, V)
    training.add_adapters(model, 4, 8, seed=1)
    assert torch.equal(model(ids).logits, before)  # LoRA's B is zero
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    lora = [name for name in shapes if "lora_" in name]
    assert len(lora) == 2 * LINEARS and sum("lora_A" in name for name in lora) == LINEARS
    assert sorted(shapes[name] for name in shapes if name not in lora) == [(32,)] * (2 * 3 + 1 + 1)


def test_the_mask_row_alone_changes_what_the_embedding_gives(training):
    embedding = nn.Embedding(6, 4).requires_grad_(False)
    table = embedding.weight.clone()
    rows = training.MaskRow(embedding, 2)
    ids = torch.tensor([[1, 2, 5], [2, 2, 0]])  # (B, T)
    assert torch.equal(rows(ids), table[ids])
    rows(ids).sum().backward()
    assert torch.equal(rows.row.grad, torch.full((4,), 3.0))  # the token occurs three times
    with torch.no_grad():
        rows.row += 1
    changed = table.clone()
    changed[2] += 1
    assert torch.equal(rows(ids), changed[ids]) and torch.equal(rows.merged().weight, changed)


def test_merged_weights_are_the_sum_and_compute_the_same(training, adapted):
    wrapper, model = adapted
    block = model.blocks[1]
    layer = block.part("gate")
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0  # alpha / rank = 2
    expected = layer.base_layer.weight + delta  # (O, C)
    row = model.embedding.row.detach().clone()
    ids = torch.randint(MASK_ID + 1, (2, 12), generator=torch.Generator().manual_seed(0))  # (B, T)
    ids[:, 4] = MASK_ID
    before, names = model(ids).logits, {name for name in model.state_dict() if "lora" in name}
    merged = training.merge_adapters(wrapper)
    assert names and not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    assert torch.allclose(merged.blocks[1].part("gate").weight, expected, atol=1e-6)
    assert torch.equal(merged.embedding.weight[MASK_ID], row) and isinstance(merged.embedding, nn.Embedding)
    assert (merged(ids).logits - before).abs().max() < 1e-4


def test_a_digest_tells_models_apart(training, tiny_model):
    model = tiny_model("dream")
    digests = {training.digest(model), training.digest(tiny_model("dream"))}
    model.blocks[2].part("down").weight.data[0, 0] += 1
    assert len(digests) == 1 and training.digest(model) not in digests
