"""The loss of a student, against plain algebra on whole logits, for both alignments."""

import pytest
import torch
import torch.nn.functional as F

from structprune.evaluation.fidelity import likeliest_and_rest
from structprune.models import logits as slices
from structprune.recovery.objectives import forward_kl
from structprune.recovery.settings import LossSettings
from structprune.recovery.student import Lesson, learn_all, learning, masked_tokens
from structprune.recovery.teacher import LiveTeacher, Predictions

MASK, LENGTH = 2047, 12
BOTH = pytest.mark.parametrize("family", ["llada", "dream"])


@pytest.fixture
def batch():
    """input_ids, noisy_ids (B, T) and rate (B,); one token of the text is itself the mask token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 90, (3, LENGTH), generator=generator)
    ids[1, 4] = MASK
    rate = torch.tensor([0.25, 0.5, 0.8])
    masked = torch.rand(3, LENGTH, generator=generator) < rate[:, None]
    masked[:, 0] = masked[:, -1] = False
    return ids, ids.masked_fill(masked, MASK), rate


def predictions_of(model, noisy):
    """(B, T, V) of every token at its own place."""
    values = model.output_head(model.encode(noisy))
    return torch.cat((values[:, :1], values[:, :-1]), dim=1) if model.shifted else values


def loss(student, settings, batch, predictions, progress=0.5):
    ids, noisy, rate = batch
    lesson = Lesson(LossSettings(**settings), predictions, progress)
    with learning(student):
        return student(input_ids=ids, noisy_ids=noisy, rate=rate, lesson=lesson)["loss"]


@BOTH
@pytest.mark.parametrize("weighting", ["uniform", "nelbo"])
def test_divergence_and_its_gradient_by_hand(tiny_model, batch, family, weighting, monkeypatch):
    monkeypatch.setattr(slices, "LOGIT_BYTES", 6 * 4 * 2048 * 3)  # three positions at once
    student, teacher = tiny_model(family, seed=1), tiny_model(family)
    ids, noisy, rate = batch
    masked = masked_tokens(student, ids, noisy)
    live = LiveTeacher(teacher).predict((ids, noisy), masked, None)
    own = loss(student, {"weighting": weighting, "least_rate": 0.3}, batch, live)
    own.backward()
    gradients = [each.grad.clone() for each in student.blocks.parameters()]
    student.zero_grad()
    log_p, log_q = (predictions_of(each, noisy).log_softmax(-1)[masked] for each in (teacher, student))  # (M, V)
    weight = {"uniform": torch.full((3,), 2.0), "nelbo": 1 / torch.tensor([0.3, 0.5, 0.8])}[weighting]
    rows = masked.nonzero()[:, 0]
    expected = (F.kl_div(log_q, log_p.detach(), log_target=True, reduction="none").sum(-1) * weight[rows]).sum() / 36
    assert own.item() == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    for one, other in zip(gradients, student.blocks.parameters()):
        assert torch.allclose(one, other.grad, rtol=1e-3, atol=1e-6)
    assert not any(each.requires_grad for each in teacher.parameters())


@BOTH
def test_cross_entropy_alone_needs_no_teacher_and_is_the_nelbo(tiny_model, batch, family):
    student = tiny_model(family)
    ids, noisy, rate = batch
    own = loss(student, {"kl": 0, "cross_entropy": 1, "weighting": "nelbo", "least_rate": 0.01}, batch, None)
    labels = ids.clone()
    expected = student(input_ids=noisy, labels=labels, mask_probability=rate).loss
    count = 36 if family == "llada" else 3 * (LENGTH - 2)
    # the mask token of the text counts as one to predict in the published loss
    extra = noisy.eq(ids) & noisy.eq(MASK)
    nats = F.cross_entropy(predictions_of(student, noisy)[extra], ids[extra], reduction="none")
    assert own.item() * 36 == pytest.approx(expected.item() * count - (nats / rate[1]).sum().item(), rel=1e-4)


def test_a_mixture_is_the_weighted_sum(tiny_model, batch):
    student, teacher = tiny_model(seed=1), tiny_model()
    ids, noisy, _ = batch
    live = LiveTeacher(teacher).predict((ids, noisy), masked_tokens(student, ids, noisy), None)
    parts = [loss(student, keys, batch, live).item() for keys in ({}, {"kl": 0, "cross_entropy": 1})]
    both = loss(student, {"kl": 0.25, "cross_entropy": 0.5}, batch, live).item()
    assert both == pytest.approx(0.25 * parts[0] + 0.5 * parts[1], rel=1e-5)


def test_temperature_and_moving_targets_change_the_loss_as_they_should(tiny_model, batch):
    student, teacher = tiny_model(seed=1), tiny_model()
    ids, noisy, _ = batch
    masked = masked_tokens(student, ids, noisy)
    live = LiveTeacher(teacher).predict((ids, noisy), masked, None)
    log_p, log_q = ((predictions_of(each, noisy)[masked] / 2).log_softmax(-1) for each in (teacher, student))
    hot = 4 * (log_p.exp() * (log_p - log_q)).sum() * 2 / 36
    assert loss(student, {"temperature": 2.0}, batch, live).item() == pytest.approx(hot.item(), rel=1e-4)
    plain = loss(student, {}, batch, live)
    shares = [loss(student, {"teacher_share": 0.5}, batch, live, progress).item() for progress in (0.0, 0.5, 1.0)]
    assert shares[0] < shares[1] < shares[2] == pytest.approx(plain.item(), rel=1e-5)
    assert loss(student, {"noisy_share": 0.5}, batch, live, 0.0) < plain


def test_kept_predictions_of_all_tokens_are_the_live_ones(tiny_model, batch):
    student, teacher = tiny_model(seed=1), tiny_model()
    ids, noisy, _ = batch
    masked = masked_tokens(student, ids, noisy)
    logits = predictions_of(teacher, noisy)[masked].detach()  # (M, V)
    tokens = logits.topk(2048, dim=-1).indices
    whole = Predictions(tokens=tokens, log_p=likeliest_and_rest(logits, tokens))
    live = LiveTeacher(teacher).predict((ids, noisy), masked, None)
    values = [loss(student, {}, batch, each) for each in (whole, live)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-4) and values[0].isfinite()
    few = tokens[:, :16]
    part = loss(student, {}, batch, Predictions(tokens=few, log_p=likeliest_and_rest(logits, few)))
    assert 0 < part.item() < values[1].item()  # by the log-sum inequality


def test_likeliest_and_rest_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    result = likeliest_and_rest(logits, torch.tensor([[0, 2]]))
    assert torch.allclose(result.exp(), torch.tensor([[0.5, 0.125, 0.375]]))
    assert torch.allclose(forward_kl(result, result), torch.zeros(1))


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3", "sdar"])
def test_a_batch_without_a_masked_token_has_no_loss_and_gradients(tiny_model, batch, family):
    """Of every weight: DDP waits for all of them."""
    student = tiny_model(family)
    ids, _, rate = batch
    ids = ids.clone().clamp(max=90)  # the text's own mask token would be one to predict
    value = loss(student, {"kl": 0, "cross_entropy": 1}, (ids, ids, rate), None)
    value.backward()
    assert value.item() == 0
    assert all(each.grad is not None and not each.grad.any() for each in student.parameters())


def test_the_forward_pass_is_its_own_again_afterwards(tiny_model, batch):
    student = tiny_model()
    before = student(batch[1]).logits
    loss(student, {"kl": 0, "cross_entropy": 1}, batch, None)
    assert torch.equal(student(batch[1]).logits, before)


def test_what_only_decides_a_choice_does_not_learn(tiny_model):
    """DDP waits for a gradient of every weight that learns, and the biases of a router get none."""
    model = tiny_model("llada2")
    model.requires_grad_(False)
    learn_all(model)
    still = {name for name, each in model.named_parameters() if not each.requires_grad}
    assert still == {f"model.layers.{index}.mlp.gate.expert_bias" for index in (1, 2)}
    ids = torch.randint(0, 90, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    noisy = ids.masked_fill(torch.arange(LENGTH) % 2 == 0, MASK)
    loss(model, {"kl": 0, "cross_entropy": 1}, (ids, noisy, torch.full((4,), 0.5)), None).backward()
    weights = {name: each for name, each in model.named_parameters() if "experts." not in name}  # one may see no token
    assert {name for name, each in weights.items() if each.grad is None} == still
