"""Training a (pruned) model: the masked-diffusion loss by hand, gradient checkpointing, and PEFT LoRA on real text."""

import math

import pytest
import torch
import torch.nn.functional as F

from structprune import Plan, apply_plan, load_model, load_tokenizer
from structprune.assets import model_directory, text_file
from structprune.structured.plan import BlockPlan
from tests.tiny_values import GRAPHS

MASK_ID = 2047


def noisy(ids, positions):
    """`ids` with the mask id at (row, position) pairs; (B, T) -> (B, T)."""
    out = ids.clone()
    for row, position in positions:
        out[row, position] = MASK_ID
    return out


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
def test_loss_is_the_nelbo_computed_by_hand(tiny_model, family):
    """Sum over masked positions of CE / p over the number of maskable ones; Dream: shifted, edges never masked."""
    model = tiny_model(family)
    labels = torch.randint(0, 2047, (2, 6), generator=torch.Generator().manual_seed(5))  # (B, T)
    places = [(0, 1), (0, 4), (1, 2)]
    ids, p = noisy(labels, places), torch.tensor([0.25, 0.5])  # (B, T), (B,)
    ignored = labels.clone()
    ignored[1, 3] = -100  # not maskable
    with torch.no_grad():
        output = model(ids, labels=ignored, mask_probability=p)
    nats = 0.0
    for row, position in places:
        seen = output.logits[row, position - 1 if family == "dream" else position]  # (V,)
        nats += -F.log_softmax(seen, dim=-1)[labels[row, position]].item() / p[row].item()
    maskable = 2 * 4 - 1 if family == "dream" else 2 * 6 - 1
    assert output.loss.item() == pytest.approx(nats / maskable, rel=1e-5)
    with torch.no_grad():
        assert torch.equal(output.logits, model(ids).logits)


@pytest.mark.parametrize("family", [family for family in GRAPHS if family != "nemotron-labs"])  # of two losses
def test_loss_with_a_rate_per_token(tiny_model, family):
    """CE / p of each masked token's own p; equal rates along a row are a rate per row."""
    model = tiny_model(family)
    labels = torch.randint(0, 2047, (2, 6), generator=torch.Generator().manual_seed(5))  # (B, T)
    places = [(0, 1), (0, 4), (1, 2)]
    ids, p = noisy(labels, places), torch.linspace(0.1, 0.9, 12).view(2, 6)  # 2 x (B, T)
    with torch.no_grad():
        output = model(ids, labels=labels, mask_probability=p)
        same = (p[:, 0], p[:, :1].expand(2, 6), p[:, 0].tolist())
        rows = [model(ids, labels=labels, mask_probability=each).loss for each in same]
    nats = 0.0
    for row, position in places:
        seen = output.logits[row, position - 1 if family == "dream" else position]  # (V,)
        nats += -F.log_softmax(seen, dim=-1)[labels[row, position]].item() / p[row, position].item()
    assert output.loss.item() == pytest.approx(nats / (2 * 4 if family == "dream" else 2 * 6), rel=1e-5)
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("p", [0.5, torch.ones(1), torch.ones(3), torch.ones(6), torch.ones(2, 1), torch.ones(1, 6)])
def test_rates_of_other_shapes_are_refused(tiny_model, p):
    ids = torch.arange(12).view(2, 6)  # (B, T)
    shape = tuple(torch.as_tensor(p).shape)
    with pytest.raises(ValueError) as caught:
        tiny_model("llada")(ids, labels=ids, mask_probability=p)
    assert str(caught.value) == f"mask_probability must be of shape (2,) or (2, 6), not {shape}"


def test_dreams_edges_carry_no_loss(tiny_model):
    model = tiny_model("dream")
    labels = torch.arange(6)[None]  # (1, T)
    inside = noisy(labels, [(0, 2)])
    edges = noisy(labels, [(0, 0), (0, 2), (0, 5)])
    _, masked, _ = model.noise(edges, labels, torch.tensor([0.5]))
    assert masked.tolist() == [[False, False, True, False, False, False]]
    _, same, _ = model.noise(inside, labels, torch.tensor([0.5]))
    assert torch.equal(masked, same)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_own_noise_follows_the_schedule(tiny_model, family):
    model = tiny_model(family)
    labels = torch.randint(0, 2047, (4, 4000), generator=torch.Generator().manual_seed(6))  # (B, T)
    labels[:, 7] = -100
    clean = labels.clamp(min=0)  # (B, T)
    torch.manual_seed(0)
    ids, masked, p = model.noise(clean, labels)
    assert torch.equal(ids == MASK_ID, masked) and torch.equal(ids[~masked], clean[~masked])
    assert not masked[:, 7].any() and masked[:, [0, -1]].any() == (family == "llada")
    t = sorted(((p - 1e-3) / (1 - 1e-3)).tolist())
    assert [math.floor(4 * value) for value in t] == [0, 1, 2, 3]  # stratified: one in each quarter
    assert torch.allclose(masked.float().mean(1), p, atol=0.03)


def test_no_masked_position_gives_zero_loss(tiny_model):
    ids = torch.arange(6)[None]  # (1, T)
    output = tiny_model("llada")(ids, labels=ids, mask_probability=torch.tensor([0.5]))
    assert output.loss.item() == 0.0
    output.loss.backward()


def test_loss_needs_ids(tiny_model):
    model = tiny_model("llada")
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32), labels=torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")  # renamed in transformers 5.24, in use everywhere
@pytest.mark.parametrize("family", GRAPHS)
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, family):
    model = tiny_model(family).train()
    ids = torch.randint(0, 2047, (2, 12), generator=torch.Generator().manual_seed(7))  # (B, T)
    calls = {False: 0, True: 0}
    grads = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        again = lambda *_: calls.update({checkpointing: calls[checkpointing] + 1})  # noqa: B023, E731
        count = model.blocks[0].register_forward_pre_hook(again)
        model.zero_grad()
        torch.manual_seed(1)
        model(ids, labels=ids).loss.backward()
        count.remove()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        grads[checkpointing] = {name: parameter.grad.clone() for name, parameter in trained.items()}
    assert calls == {False: 1, True: 2}  # the block really ran again in the backward pass
    for name, grad in grads[False].items():
        assert torch.allclose(grad, grads[True][name], atol=1e-7), name
    assert max(grad.abs().max() for grad in grads[False].values()) > 1e-3


@pytest.mark.slow
def test_two_lora_steps_on_real_text_lower_the_loss_of_a_pruned_model():
    """PEFT on the embedded model cut to 6 of 8 heads and 320 of 640 channels, measured on fixed noise."""
    peft = pytest.importorskip("peft")
    dense = load_model(model_directory())
    kept = BlockPlan(tuple(range(6)), tuple(range(6)), tuple(range(0, 640, 2)))
    pruned = apply_plan(dense, Plan("llada", (kept,) * 5))
    text = text_file("calibration.txt").read_text(encoding="utf-8")[:8000]
    ids = torch.tensor(load_tokenizer(model_directory())(text)["input_ids"][: 8 * 96]).reshape(8, 96)  # (B, T)
    generator = torch.Generator().manual_seed(0)
    p = torch.linspace(0.2, 0.9, 8)  # (B,)
    masked = torch.rand(ids.shape, generator=generator) < p[:, None]  # (B, T)
    fixed = {"input_ids": ids.masked_fill(masked, MASK_ID), "labels": ids, "mask_probability": p}
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "attn_out", "ff_proj", "up_proj"]
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets)
    model = peft.get_peft_model(pruned, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert 0 < sum(parameter.numel() for parameter in trained) < 0.1 * pruned.num_parameters()
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(2):
        model.train()
        loss = model(**fixed).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        losses.append(model.eval()(**fixed).loss.item())
    assert losses[0] > losses[1] > losses[2]
    frozen = pruned.get_submodule("model.transformer.blocks.0.ff_out").weight
    assert torch.equal(frozen, dense.get_submodule("model.transformer.blocks.0.ff_out").weight[:, ::2])
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert merged(**fixed).loss.item() == pytest.approx(losses[2], abs=1e-4)
