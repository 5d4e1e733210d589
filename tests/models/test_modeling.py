"""What the forward pass promises beside its logits: padding, GQA, hidden states, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from structprune.models.adapter import Adapter
from structprune.models.layers_structprune import AttentionCore
from structprune.models.rotary_structprune import rotary_tables, rotate
from tests.tiny_values import GRAPHS


@pytest.mark.parametrize("family", GRAPHS)
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


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
def test_padding_as_dreams_own_sampler_gives_it(tiny_model, family):
    """A 4-D mask and positions, in the order of Dream's `generation_utils`: the 2-D mask's logits at real tokens."""
    model = tiny_model(family)
    ids = torch.randint(0, 2047, (2, 12), generator=torch.Generator().manual_seed(2))  # (B, T)
    real = torch.ones(2, 12, dtype=torch.bool)  # (B, T)
    real[0, :5] = False
    positions = (real.long().cumsum(-1) - 1).masked_fill(~real, 1)  # (B, T)
    square = real[:, None, :, None] & real[:, None, None, :]  # (B, 1, T, T)
    with torch.no_grad():
        expected = model(ids, real).logits  # (B, T, V)
        logits = model(ids, square, positions).logits  # (B, T, V)
        row = model(ids, real[:, None, None, :], positions).logits  # (B, T, V)
        blind = model(ids, square).logits  # (B, T, V): positions 0.., which only shifts a row
    assert logits.isfinite().all()
    for each in (logits, row, blind):
        assert (each[real] - expected[real]).abs().max() < 1e-5


@pytest.mark.parametrize("family", GRAPHS)
def test_a_float_mask_is_added_to_the_scores(tiny_model, family):
    model = tiny_model(family)
    ids = torch.randint(0, 2047, (2, 9), generator=torch.Generator().manual_seed(2))  # (B, T)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]  # (1, 1, T, T)
    added = torch.zeros(1, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
    with torch.no_grad():
        chosen, summed = model(ids, causal).logits, model(ids, added).logits  # 2 x (B, T, V)
        start = model(ids[:, :4], causal[..., :4, :4]).logits  # (B, 4, V)
        half = model.bfloat16()(ids, added).logits  # (B, T, V)
    assert (chosen - summed).abs().max() < 1e-5
    assert (chosen[:, :4] - start).abs().max() < 1e-5  # what follows is not seen
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
def test_position_ids(tiny_model, family):
    """Those that are the default change no bit; distances are what counts; others give other logits."""
    model, ids = tiny_model(family), torch.arange(20).view(2, 10)  # (B, T)
    positions = torch.arange(10)[None]  # (1, T)
    with torch.no_grad():
        plain = model(ids).logits  # (B, T, V)
        assert torch.equal(model(ids, position_ids=positions).logits, plain)
        assert torch.equal(model(ids, position_ids=positions.expand(2, 10)).logits, plain)
        assert torch.equal(model(ids, "full", positions).logits, plain)  # as in Dream's own sampler
        assert (model(ids, position_ids=positions + 7).logits - plain).abs().max() < 1e-4
        rows = torch.cat((positions, 2 * positions))  # (B, T)
        logits = model(ids, position_ids=rows).logits  # (B, T, V)
        order = torch.randperm(10, generator=torch.Generator().manual_seed(0))  # (T,)
        shuffled = model(ids[:, order], position_ids=positions[:, order]).logits  # (B, T, V)
    assert (logits[0] - plain[0]).abs().max() < 1e-5 and (logits[1] - plain[1]).abs().max() > 1e-2
    assert (shuffled - plain[:, order]).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [
    (4,), (2, 5), (3, 4), (2, 4, 4), (2, 1, 4), (2, 4, 4, 4), (3, 1, 4, 4), (2, 1, 5, 4), (2, 1, 4, 5), (2, 1, 1, 4, 4),
])  # fmt: skip
def test_masks_of_other_shapes_are_refused(tiny_model, shape):
    allowed = "(2, 4), (2, 1, 4, 4) or (2, 1, 1, 4)"
    with pytest.raises(ValueError) as caught:
        tiny_model("llada")(torch.zeros(2, 4, dtype=torch.long), torch.ones(shape, dtype=torch.bool))
    assert str(caught.value) == f"attention_mask must be {allowed}, not {shape}"


@pytest.mark.parametrize("options, message", [
    ({"attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.long)}, "4-D attention_mask must be bool .*torch.int64"),
    ({"attention_mask": "causal"}, r"attention_mask must be \(2, 4\).* not 'causal'"),
    ({"position_ids": torch.arange(4)}, r"position_ids must be \(2, 4\) or \(1, 4\) integers, not \(4,\) torch.int64"),
    ({"position_ids": torch.zeros(2, 5, dtype=torch.long)}, r"not \(2, 5\)"),
    ({"position_ids": torch.zeros(2, 4)}, "integers, not .* torch.float32"),
])  # fmt: skip
def test_masks_and_positions_that_say_nothing_clear(tiny_model, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        tiny_model("llada")(torch.zeros(2, 4, dtype=torch.long), **options)
    assert "\n" not in str(caught.value)


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
