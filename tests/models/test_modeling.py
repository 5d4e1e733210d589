"""What the forward pass promises beside its logits: padding, GQA, hidden states, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from structprune.models.adapter import Adapter
from structprune.models.layers_structprune import AttentionCore, rotary_tables, rotate


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_is_inert(tiny_model, family, left):
    """Padded and attention-masked, the real tokens' logits are those of the sequence by itself."""
    model = tiny_model(family)
    ids = torch.randint(0, 2047, (1, 9), generator=torch.Generator().manual_seed(2))  # (1, T)
    long = torch.randint(0, 2047, (1, 14), generator=torch.Generator().manual_seed(3))  # (1, T')
    padding = torch.full((1, 5), 11)
    padded = torch.cat((padding, ids) if left else (ids, padding), dim=1)  # (1, T')
    batch = torch.cat((padded, long))  # (2, T')
    mask = torch.ones(2, 14, dtype=torch.long)
    real = slice(5, 14) if left else slice(0, 9)
    mask[0] = 0
    mask[0, real] = 1
    with torch.no_grad():
        alone, other = model(ids).logits, model(long).logits  # (1, T, V), (1, T', V)
        together = model(batch, attention_mask=mask).logits  # (2, T', V)
        blind = model(batch).logits  # (2, T', V)
    assert (together[0, real] - alone[0]).abs().max() < 1e-5
    assert (together[1] - other[0]).abs().max() < 1e-5
    assert (blind[0, real] - alone[0]).abs().max() > 1e-2  # so the mask is what does it
    assert together.isfinite().all()


def test_attention_mask_must_be_two_dimensional(tiny_model):
    with pytest.raises(ValueError, match="attention_mask must be .batch, length."):
        tiny_model("llada")(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4))


def test_grouped_attention_by_hand():
    """Query heads h // (H / K) share a key head; softmax over all keys, in both directions."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 3, 2), torch.randn(1, 2, 3, 2), torch.randn(1, 2, 3, 2)  # (B, H|K, T, D)
    out = AttentionCore()(query, key, value)  # (B, H, T, D)
    for head in range(4):
        weights = F.softmax(query[0, head] @ key[0, head // 2].T / 2**0.5, dim=-1)  # (T, T)
        assert torch.allclose(out[0, head], weights @ value[0, head // 2], atol=1e-6)


def test_rotary_by_hand():
    cos, sin = rotary_tables(torch.tensor([[0, 1]]), head_dim=2, theta=10000.0)  # (1, 1, T, D)
    x = torch.tensor([[[[1.0, 2.0], [1.0, 2.0]]]])  # (B, H, T, D)
    c, s = torch.cos(torch.tensor(1.0)), torch.sin(torch.tensor(1.0))
    expected = torch.stack((torch.tensor([1.0, 2.0]), torch.stack((c - 2 * s, 2 * c + s))))  # (T, D)
    assert torch.allclose(rotate(x, cos, sin)[0, 0], expected)


def test_rotary_angles_round_as_the_families_own_code_does():
    """1 / theta^p in fp32; theta^-p differs in the last bit of a third of the frequencies."""
    powers = torch.arange(0, 64, 2).float() / 64  # (D/2,)
    angles = torch.arange(512).float()[:, None] * (1.0 / (500000.0**powers))  # (T, D/2)
    cos, sin = rotary_tables(torch.arange(512)[None], head_dim=64, theta=500000.0)  # (1, 1, T, D)
    assert torch.equal(cos[0, 0, :, :32], angles.cos()) and torch.equal(sin[0, 0, :, 32:], angles.sin())


def test_hidden_states_and_tuple_output(tiny_model):
    model, ids = tiny_model("dream"), torch.arange(6)[None]  # (1, T)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        plain = model(ids, return_dict=False)
        head = model.output_head(output.hidden_states[-1])  # (1, T, V)
    assert len(output.hidden_states) == len(Adapter(model).blocks) + 1
    assert torch.equal(output.hidden_states[0], model.embedding(ids))
    assert torch.equal(head, output.logits) and torch.equal(plain[0], output.logits)


def test_inputs_embeds_equal_input_ids(tiny_model):
    model, ids = tiny_model("llada"), torch.arange(6)[None]  # (1, T)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=model.embedding(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("options", [{"output_attentions": True}, {"use_cache": True}])
def test_what_a_denoiser_has_not(tiny_model, options):
    with pytest.raises(ValueError, match="not available in a masked diffusion model"):
        tiny_model("llada")(torch.zeros(1, 4, dtype=torch.long), **options)
