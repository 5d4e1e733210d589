"""Log-likelihoods against those of the published implementation, on the perturbations it drew."""

import json

import pytest
import torch
from safetensors.torch import load_file

from structprune import load_model
from structprune.evaluation import choices
from structprune.evaluation.choices import Answer, Item, MonteCarlo, score_items
from structprune.evaluation.likelihood import MaskedRows, token_nats
from structprune.evaluation.perturb import FORMS
from structprune.models.encode import Batches
from structprune.models.families import family_named

RECORDED = ("llada", "dream", "a2d-qwen3", "a2d-llama", "a2d-qwen2")  # families whose code scores answers


@pytest.fixture(params=["likelihood_0", "likelihood_1"])
def recorded(parity, request):
    """Family, model, case, and what was recorded of it: tensors by name."""
    cases = json.loads((parity / "cases.json").read_text(encoding="utf-8"))["likelihood"]
    assert [case["name"] for case in cases] == ["likelihood_0", "likelihood_1"]  # every recorded case is looked at
    case = next(case for case in cases if case["name"] == request.param)
    tensors = load_file(parity / "sampling.safetensors")
    result = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(request.param + "/")}
    return parity.name, load_model(parity), case, result


def masks_and_rates(model, tensors: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked target positions (N, L) and the probability each sample was masked with (N,)."""
    masked = tensors["perturbed_ids"] == model.config.mask_token_id  # (N, T)
    prompt = len(tensors["prefix"])
    assert not masked[:, :prompt].any()
    return masked[:, prompt:], tensors["mask_probability"][:, prompt]


@pytest.mark.parametrize("tokens", [16, 200, 10_000])
@pytest.mark.parametrize("parity", RECORDED, indirect=True)
def test_recorded_rows_give_the_published_value(recorded, tokens):
    family, model, case, tensors = recorded
    masked, rate = masks_and_rates(model, tensors)
    prompt, target = tensors["prefix"], tensors["target"]
    count = len(masked)
    rows = MaskedRows(
        torch.cat((prompt, target)).expand(count, -1),
        torch.cat((masked.new_zeros(count, len(prompt)), masked), dim=1),
        torch.full((count,), len(prompt)),
    )
    assert torch.equal(rows.clean.masked_fill(rows.masked, model.config.mask_token_id), tensors["perturbed_ids"])
    nats = token_nats(
        model, rows, FORMS[family_named(family).likelihood].guidance(case["cfg_scale"]), Batches(tokens)
    ).sum(1)  # (N,)
    averaged = case.get("samples_with_a_mask", count)
    assert -(nats / rate.double()).sum().item() / averaged == pytest.approx(case["log_likelihood"], rel=0, abs=1e-4)


@pytest.mark.parametrize("parity", RECORDED, indirect=True)
def test_scoring_from_the_recorded_noise_gives_the_published_value(recorded, monkeypatch):
    """The whole way: levels to masks and weights, blocks, means."""
    family, model, case, tensors = recorded
    masked, rate = masks_and_rates(model, tensors)
    length, block = masked.shape[1], case.get("batch_size", 8)
    assert family == "dream" or torch.equal(masked.sum(1), (rate * length).round().long())
    levels = (
        (rate - 1e-3) / (1 - 1e-3) if family == "dream" else (rate[::block] * length - 0.5) / length
    )  # (N,) or (K,)
    positions = torch.where(masked, torch.zeros(()), torch.ones(())).double()  # (N, L) low where masked
    monkeypatch.setattr(choices, "draw_uniform", lambda *args: (levels.double(), positions))
    settings = MonteCarlo(case["mc_num"], block, cfg_scale=case["cfg_scale"], skip_empty=family == "dream")
    item = Item("recorded", (Answer(tensors["prefix"], tensors["target"], 1),))
    (result,) = score_items(model, [item], settings, Batches(500))
    assert result.log_likelihoods[0] == pytest.approx(case["log_likelihood"], rel=0, abs=1e-4)
    assert result.samples == case["mc_num"]
