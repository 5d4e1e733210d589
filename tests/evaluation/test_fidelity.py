"""Divergence from a reference at masked positions: by hand, against full logits, and in slices."""

import math

import pytest
import torch
import torch.nn.functional as F

from structprune.errors import UserError
from structprune.evaluation import masked
from structprune.evaluation.fidelity import (
    ReferencePredictions,
    kl_divergence,
    likeliest,
    masked_kl,
    reference_predictions,
)
from structprune.evaluation.nelbo import masked_nelbo
from structprune.models import logits

MASK, LENGTH, VOCABULARY = 2047, 9, 2048
P = torch.tensor([[0.25, 0.5, 0.1, 0.15]]).log()  # (1, V) as logits
EVEN = torch.zeros(1, 4)  # (1, V)


@pytest.fixture
def text():
    """ids (N, T) and noisy (N, S, T); the edges stay visible, as Dream wants."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (3, LENGTH), generator=generator)
    ids[1, 4] = MASK  # text may hold the mask token itself: nothing to predict there
    noisy = ids[:, None].repeat(1, 2, 1)
    drawn = torch.rand(noisy.shape, generator=generator) < torch.tensor([[0.2, 0.9], [0.5, 0.6], [0.3, 1.0]])[..., None]
    drawn[..., 0] = drawn[..., -1] = False
    return ids, torch.where(drawn, MASK, noisy)


def test_the_likeliest_tokens_and_the_rest():
    two = likeliest(P + 3, top=2)  # logits are known up to a constant
    assert two.tokens.tolist() == [[1, 0]] and two.vocabulary == 4
    assert two.log_p.exp().tolist()[0] == pytest.approx([0.5, 0.25]) and two.rest.exp().item() == pytest.approx(0.25)
    every = likeliest(P, top=9)
    assert every.tokens.tolist() == [[1, 0, 3, 2]] and every.rest.item() == -math.inf


def test_the_rest_of_a_sure_prediction_does_not_cancel():
    sure = likeliest(torch.tensor([[0.0, 30.0, 0.0, 0.0]]), top=1)
    assert sure.rest.item() == pytest.approx(math.log(3) - 30, abs=1e-4)  # 1 less the others would be 0 in fp32


def test_divergence_by_hand():
    """0.5 ln 2 + 0.25 ln 1 + 0.25 ln ½ with two tokens kept; all four: 0.5 ln 2 + 0.15 ln 0.6 + 0.1 ln 0.4."""
    assert kl_divergence(likeliest(P, 2), EVEN).item() == pytest.approx(0.25 * math.log(2), abs=1e-6)
    full = 0.5 * math.log(2) + 0.15 * math.log(0.6) + 0.1 * math.log(0.4)
    assert kl_divergence(likeliest(P, 4), EVEN).item() == pytest.approx(full, abs=1e-6)
    backward = 0.25 * (math.log(0.5) - math.log(0.6) - math.log(0.4))
    assert kl_divergence(likeliest(EVEN, 4), P).item() == pytest.approx(backward, abs=1e-6)


def test_the_bound_rises_with_the_tokens_kept():
    generator = torch.Generator().manual_seed(1)
    ours, theirs = 3 * torch.randn(2, 50, 400, generator=generator)
    full = (theirs.double().softmax(-1) * (theirs.double().log_softmax(-1) - ours.double().log_softmax(-1))).sum(-1)
    bounds = [kl_divergence(likeliest(theirs, top), ours) for top in (1, 10, 100, 400)]
    for lower, upper in zip(bounds, bounds[1:], strict=False):
        assert (lower <= upper + 1e-5).all()
    assert (bounds[0] < 0.9 * full).all() and torch.allclose(bounds[-1], full.float(), rtol=1e-4)


def by_hand(model, reference, ids, noisy):
    """(N, S, 5): masked tokens, cross-entropy, right, full divergence and agreement, one position at a time."""
    sums = torch.zeros(3, 2, 5)
    for window in range(3):
        for copy in range(2):
            ours, theirs = (each(noisy[window, copy][None]).logits[0] for each in (model, reference))  # (T, V)
            for position in range(LENGTH):
                if noisy[window, copy, position] != MASK or ids[window, position] == MASK:
                    continue
                source = position - 1 if model.shifted else position  # Dream's position i predicts token i + 1
                q, p, clean = ours[source], theirs[source], ids[window, position]  # (V,), (V,), ()
                kl = F.kl_div(q.log_softmax(0), p.log_softmax(0), reduction="sum", log_target=True)
                values = (1, F.cross_entropy(q, clean), q.argmax() == clean, kl, q.argmax() == p.argmax())
                sums[window, copy] += torch.stack([torch.as_tensor(value).float() for value in values])
    return sums


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.inference_mode()
def test_exact_divergence_by_hand(tiny_model, text, family, batch):
    ids, noisy = (torch.where(each == MASK, each, each % 3) for each in text)
    model, reference = tiny_model(family, seed=1), tiny_model(family)
    with torch.no_grad():  # text of three tokens, which alone are likely: some are predicted right, and alike
        for each in (model, reference):
            each.output_head.weight[3:] *= 0.1
    kept, own = reference_predictions(reference, ids, noisy, VOCABULARY, batch)
    result, expected = masked_kl(model, ids, noisy, kept, batch), by_hand(model, reference, ids, noisy)
    columns = torch.stack((result.masked_tokens, result.nats, result.correct, result.kl, result.agreed), dim=-1)
    assert torch.allclose(columns, expected, rtol=1e-3, atol=1e-4)
    assert 0 < expected[..., 2].sum() < expected[..., 0].sum() and 0 < expected[..., 4].sum() < expected[..., 0].sum()
    total = expected.sum((0, 1))
    assert result.mean_kl == pytest.approx((total[3] / total[0]).item(), rel=1e-4)
    assert result.accuracy == pytest.approx((total[2] / total[0]).item())
    assert result.agreement == pytest.approx((total[4] / total[0]).item())
    assert torch.allclose(own.nats, by_hand(reference, reference, ids, noisy)[..., 1], rtol=1e-4)
    assert own.kl.sum() == 0 and torch.equal(own.agreed, own.masked_tokens)


def test_a_model_agrees_with_itself(tiny_model, text):
    model = tiny_model()
    with torch.no_grad():
        model.output_head.weight[1024:] = model.output_head.weight[:1024]  # every likeliest token is one of two
    kept, own = reference_predictions(model, *text, top=5, batch=2)
    result = masked_kl(model, *text, kept, batch=7)
    assert result.mean_kl == pytest.approx(0, abs=1e-6) and result.agreement == 1
    assert torch.allclose(result.nats, own.nats, rtol=1e-5) and result.accuracy == own.accuracy


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_cross_entropy_is_that_of_the_nelbo(tiny_model, text, family):
    model = tiny_model(family)
    _, own = reference_predictions(model, *text)
    plain = masked_nelbo(model, *text, torch.ones(3, 2))
    assert torch.equal(own.nats.sum(1), plain.masked_nats) and torch.equal(
        own.masked_tokens.sum(1), plain.masked_tokens
    )


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_few_logits_exist_at_once(tiny_model, text, family, monkeypatch):
    model, reference, rows = tiny_model(family, seed=1), tiny_model(family), []
    whole = masked_kl(model, *text, reference_predictions(reference, *text, top=20)[0])
    monkeypatch.setattr(logits, "LOGIT_BYTES", 3 * 3 * 4 * VOCABULARY)  # of three positions, in three forms
    for each in (model, reference):
        each.output_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    kept, _ = reference_predictions(reference, *text, top=20)
    result = masked_kl(model, *text, kept)
    assert max(rows) == 3 and sum(rows) == 2 * result.masked_tokens.sum() and kept.tokens.shape == (len(kept), 20)
    assert torch.allclose(result.kl, whole.kl, rtol=1e-4) and torch.equal(result.agreed, whole.agreed)


def test_memory_that_runs_out_moves_no_prediction(tiny_model, text, monkeypatch):
    real, sizes, model = masked._row_sums, [], tiny_model()
    whole, _ = reference_predictions(model, *text, top=20)

    def tight(model, rows, *others):
        sizes.append(len(rows[0]))
        sums = real(model, rows, *others)  # what was kept of a batch that then fails is written again
        if len(rows[0]) > 2:
            raise torch.OutOfMemoryError("full")
        return sums

    monkeypatch.setattr(masked, "_row_sums", tight)
    kept, _ = reference_predictions(model, *text, top=20)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1] and torch.equal(kept.tokens, whole.tokens)
    assert torch.allclose(kept.log_p, whole.log_p, atol=1e-5)


def test_nothing_masked_is_nothing_to_compare(tiny_model, text):
    model, noisy = tiny_model(), text[0][:, None].expand(3, 2, LENGTH)
    kept, _ = reference_predictions(model, text[0], noisy)
    result = masked_kl(model, text[0], noisy, kept)
    assert len(kept) == 0 and result.mean_kl == 0 and result.masked_tokens.sum() == 0


def test_other_models_and_windows_are_refused(tiny_model, text):
    kept, _ = reference_predictions(tiny_model(), *text)
    with pytest.raises(UserError, match="the reference predicts 2048 tokens and the model 2056: compare models of one"):
        masked_kl(tiny_model(vocab_size=2056, embedding_size=2056), *text, kept)
    with pytest.raises(ValueError, match=f"the reference has {len(kept)} positions, and "):
        masked_kl(tiny_model(), text[0][:1], text[1][:1], kept)


def test_a_part_of_the_predictions():
    every = likeliest(torch.cat((P, EVEN, P)), 2)
    part = every.at(slice(1, 3), torch.device("cpu"))
    assert len(part) == 2 and torch.equal(part.tokens, every.tokens[1:]) and part.vocabulary == 4
    assert ReferencePredictions.empty(3, 9, 4).tokens.shape == (3, 4)
