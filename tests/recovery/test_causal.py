"""What a model that is causal too learns of its second use, against whole logits, and how it is measured."""

import pytest
import torch
import torch.nn.functional as F

from structprune.errors import UserError
from structprune.evaluation.causal import causal_kl, causal_reference
from structprune.models.encode import Batches
from structprune.recovery.checks import with_causal
from structprune.recovery.held_out import HeldOutStudy, paired
from structprune.recovery.settings import LossSettings
from structprune.recovery.student import Lesson, learning, masked_tokens
from structprune.recovery.teacher import LiveTeacher
from structprune.recovery.text import RecoveryText
from structprune.recovery.windows import NoisyWindows
from structprune.runs.recover import recover
from structprune.workers import Workers
from tests.tiny_values import MASK_ID

LENGTH = 11


@pytest.fixture
def models(tiny_model):
    """Student and teacher with blocks of four tokens."""
    return tiny_model("nemotron-labs", seed=1), tiny_model("nemotron-labs")


@pytest.fixture
def batch():
    """input_ids, noisy_ids (B, T) and rate (B,)."""
    generator = torch.Generator().manual_seed(1)
    ids, rate = torch.randint(0, 90, (3, LENGTH), generator=generator), torch.tensor([0.25, 0.5, 0.8])
    masked = torch.rand(3, LENGTH, generator=generator) < rate[:, None]
    return ids, ids.masked_fill(masked, MASK_ID), rate


def next_logits(model, ids):
    """(B, T - 1, V) of tokens 2 to T from the text before them alone, one prefix at a time."""
    rows = []
    for end in range(1, ids.shape[1]):
        context = model.open_context((len(ids), end), ids.device, None, end)
        rows.append(model.output_head(model.encode(ids[:, :end], context=context)[:, -1]))
    return torch.stack(rows, dim=1)


def loss(student, teacher, batch, learnt=None, **settings):
    ids, noisy, rate = batch
    predictions = None
    if teacher is not None:
        live = LiveTeacher(teacher, causal=bool(settings["causal"]))
        predictions = live.predict((ids, noisy), masked_tokens(student, ids, noisy), None, learnt)
    lesson = Lesson(LossSettings(**settings), predictions, 0.5)
    with learning(student):
        return student(input_ids=ids, noisy_ids=noisy, rate=rate, lesson=lesson, learnt=learnt)["loss"]


@pytest.mark.parametrize("answers", [False, True])
def test_divergence_at_next_tokens_by_hand(models, batch, answers):
    student, teacher = models
    learnt = torch.arange(LENGTH).expand(3, -1) % 3 > 0 if answers else None  # (B, T)
    plain = loss(student, teacher, batch, learnt, causal=0.0)
    both = loss(student, teacher, batch, learnt, causal=0.5)
    log_p, log_q = (next_logits(model, batch[0]).log_softmax(-1) for model in (teacher, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # (B, T - 1)
    if learnt is not None:
        kl = kl * learnt[:, 1:]
    assert (both - plain).item() == pytest.approx(0.5 * kl.sum().item() / batch[0].numel(), rel=1e-3)
    both.backward()
    assert all(block.part("query").weight.grad.abs().max() > 0 for block in student.blocks)


def test_text_alone_and_a_moving_target(models, batch):
    student, teacher = models
    ids, labels = batch[0], batch[0][:, 1:]
    parts = [loss(student, None, batch, kl=0, cross_entropy=2.0, causal=weight) for weight in (0.0, 1.0)]
    nats = F.cross_entropy(next_logits(student, ids).transpose(1, 2), labels, reduction="sum")
    assert (parts[1] - parts[0]).item() == pytest.approx(2 * nats.item() / ids.numel(), rel=1e-4)
    whole, half = (loss(student, teacher, batch, causal=1.0, teacher_share=share) for share in (1.0, 0.0))
    assert 0 < half < whole  # half way through training, half of the target is the student's own prediction


def test_held_out_figures_by_hand(models, batch):
    student, teacher = models
    ids, learnt = batch[0], torch.arange(LENGTH).expand(3, -1) > 4  # (n, T)
    study = HeldOutStudy(teacher, RecoveryText(ids, ids, learnt, learnt), 2, 0, Workers())
    figures = study.measure(student)
    with torch.no_grad():
        log_p, log_q = (next_logits(model, ids).log_softmax(-1) for model in (teacher, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[:, 4:].mean(1)  # (n,), of which 256 tokens and all others see a part
    nats = -log_q.gather(-1, ids[:, 1:, None])[:, 4:, 0].mean(1)  # (n,)
    assert torch.allclose(figures.causal_ce, nats.double(), rtol=1e-4)
    assert (figures.causal_kl < kl).all() and (figures.causal_kl > 0.1 * kl).all()
    assert study.teacher.causal_kl.abs().max() == 0 and study.teacher.means()["causal_ce"] != figures.causal_ce.mean()
    means, change = figures.means(), paired(study.teacher, figures)
    assert change["causal_kl"]["mean"] == pytest.approx(means["causal_kl"])
    goal = LossSettings(causal=0.5, cross_entropy=2.0).goal(means)
    assert goal == pytest.approx(means["kl"] + 2 * means["nelbo"] + 0.5 * (means["causal_kl"] + 2 * means["causal_ce"]))


def test_predictions_of_all_tokens_give_the_whole_divergence(models, batch):
    student, teacher = models
    reference, own = causal_reference(teacher, batch[0], Batches(2 * LENGTH), top=2048)
    figures = causal_kl(student, batch[0], reference, Batches(LENGTH))
    with torch.no_grad():
        log_p, log_q = (next_logits(model, batch[0]).log_softmax(-1) for model in (teacher, student))
    assert torch.allclose(figures.kl, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-3, atol=1e-5)
    assert torch.equal(own.kl, torch.zeros(3, LENGTH - 1))


def test_items_say_what_is_learnt_where_not_all_is():
    windows, learnt = torch.arange(24).view(2, 12), torch.arange(24).view(2, 12) % 2 == 0
    items = [NoisyWindows(windows, marks, range(4), 99, seed=3)[1] for marks in (learnt, None)]
    assert torch.equal(items[0]["learnt"], items[0]["input_ids"] % 2 == 0) and "learnt" not in items[1]


def test_the_weight_is_the_models_and_what_cannot_be_is_refused(models, tiny_model, recover_config):
    nemotron, other = models[0], tiny_model("sdar")
    assert with_causal(recover_config(), nemotron).loss.causal == 1.0
    nemotron.config.ar_loss_weight, nemotron.config.dlm_loss_weight = 0.3, 0.6
    assert with_causal(recover_config(), nemotron).loss.causal == pytest.approx(0.5)
    assert with_causal(recover_config(loss__causal=0.25), nemotron).loss.causal == 0.25
    assert with_causal(recover_config(), other).loss.causal is None
    with pytest.raises(UserError, match=r"loss.causal = 0.5 has no effect without a model that is causal too"):
        with_causal(recover_config(loss__causal=0.5), other)
    with pytest.raises(UserError, match=r"teacher.cache = kept keeps .* leave it out, or set loss.causal = 0"):
        with_causal(recover_config(teacher__cache="kept"), nemotron)
    assert with_causal(recover_config(teacher__cache="kept", loss__causal=0), nemotron).loss.causal == 0


@pytest.mark.slow
def test_a_recovery_gains_in_both_uses(pair, recover_config, tmp_path):
    dense, small = pair("nemotron-labs")
    report = recover(str(small), str(dense), tmp_path / "out", recover_config()).report
    assert report["kept"] == "trained" and report["config"]["loss"]["causal"] == 1.0
    for name in ("kl", "causal_kl"):
        assert report["after"][name] < 0.97 * report["before"][name]
    assert report["change"]["causal_ce"].keys() == {"mean", "standard_error"}
    assert "| next tokens, nats |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
