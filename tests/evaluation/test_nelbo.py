"""The masked-diffusion NELBO, one position at a time by hand."""

import pytest
import torch
import torch.nn.functional as F

from structprune.evaluation.nelbo import Nelbo, masked_nelbo
from structprune.models import logits
from tests.tiny_values import GRAPHS

MASK, LENGTH = 2047, 9
ONE_LOSS = [family for family in GRAPHS if family != "nemotron-labs"]  # it is causal too: clean tokens count as well


@pytest.fixture
def text():
    """ids (N, T), noisy (N, S, T) and p (N, S); the edges stay visible, as Dream wants."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (3, LENGTH), generator=generator)
    ids[1, 4] = MASK  # text may hold the mask token itself: nothing to predict there
    p = torch.tensor([[0.2, 0.9], [0.5, 0.6], [0.3, 1.0]])
    noisy = ids[:, None].repeat(1, 2, 1)
    drawn = torch.rand(noisy.shape, generator=generator) < p[..., None]
    drawn[..., 0] = drawn[..., -1] = False
    return ids, torch.where(drawn, MASK, noisy), p


def by_hand(model, ids, noisy, p):
    """(N,) NELBO, (N,) summed cross-entropy, (N,) masked tokens."""
    maskable = LENGTH - 2 if model.edges_visible else LENGTH
    nelbo, nats, tokens = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    for window in range(3):
        for copy in range(2):
            logits = model(noisy[window, copy][None]).logits[0]  # (T, V)
            for position in range(LENGTH):
                if noisy[window, copy, position] != MASK or ids[window, position] == MASK:
                    continue
                source = position - 1 if model.shifted else position  # Dream's position i predicts token i + 1
                loss = F.cross_entropy(logits[source], ids[window, position])
                nelbo[window] += loss / p[window, copy] / maskable / 2
                nats[window], tokens[window] = nats[window] + loss, tokens[window] + 1
    return nelbo, nats, tokens


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
@torch.inference_mode()
def test_nelbo_by_hand(tiny_model, text, family, batch):
    model = tiny_model(family)
    result, (nelbo, nats, tokens) = masked_nelbo(model, *text, batch=batch), by_hand(model, *text)
    assert torch.allclose(result.nelbo, nelbo, rtol=1e-4)
    assert torch.allclose(result.masked_nats, nats, rtol=1e-4)
    assert torch.equal(result.masked_tokens, tokens)
    assert result.mean == pytest.approx(nelbo.mean().item(), rel=1e-4)
    assert result.cross_entropy == pytest.approx((nats.sum() / tokens.sum()).item(), rel=1e-4)


def test_a_uniform_model_costs_the_log_of_the_vocabulary(tiny_model, text):
    model = tiny_model()
    with torch.no_grad():
        model.output_head.weight.zero_()
    ids, noisy, _ = text
    everything = torch.full_like(noisy, MASK)
    ids = ids.clamp(max=89)
    result = masked_nelbo(model, ids, everything, torch.ones(3, 2))
    log = torch.tensor(2048.0).log().item()
    assert result.nelbo.tolist() == pytest.approx([log] * 3, rel=1e-5) and result.cross_entropy == pytest.approx(
        log, rel=1e-5
    )
    assert masked_nelbo(model, ids, everything, torch.full((3, 2), 0.5)).mean == pytest.approx(2 * log, rel=1e-5)


@pytest.mark.parametrize("family", ONE_LOSS)
def test_the_head_runs_at_masked_positions_only(tiny_model, text, family):
    model, rows = tiny_model(family), []
    handle = model.output_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    result = masked_nelbo(model, *text, batch=2)
    handle.remove()
    assert sum(rows) == result.masked_tokens.sum() < 3 * 2 * LENGTH


@pytest.mark.parametrize("family", [*ONE_LOSS, "a2d-qwen3-blocks"])
def test_few_logits_exist_at_once(tiny_model, text, family, monkeypatch):
    model, rows = tiny_model(family), []
    whole = masked_nelbo(model, *text, batch=4)
    monkeypatch.setattr(logits, "LOGIT_BYTES", 3 * 2 * 4 * 2048)  # of three positions, as they are and normalised
    handle = model.output_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    result = masked_nelbo(model, *text, batch=4)
    handle.remove()
    assert max(rows) == 3 and sum(rows) == result.masked_tokens.sum() and len(rows) > 4
    assert torch.allclose(result.nelbo, whole.nelbo, rtol=1e-5)


def test_nothing_masked_costs_nothing(tiny_model, text):
    ids, noisy, p = text
    result = masked_nelbo(tiny_model(), ids, ids[:, None].expand_as(noisy), p)
    assert result.nelbo.tolist() == [0, 0, 0] and result.cross_entropy == 0


def test_mean_and_standard_error():
    result = Nelbo(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2.0, 3.0, 5.0]), torch.tensor([1.0, 1.0, 2.0]))
    assert result.mean == 3 and result.cross_entropy == 2.5
    assert result.standard_error == pytest.approx((14 / 2) ** 0.5 / 3**0.5)  # sample deviation over root n
    assert Nelbo(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([1.0])).standard_error == 0
