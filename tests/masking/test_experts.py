"""Masks of experts: those that see no token go by their weights, and the others are fitted on what they see."""

import json

import pytest
import torch

from structprune import load_model
from structprune.config import Config
from structprune.masking.blocks import fill_unseen
from structprune.models.adapter import Adapter
from structprune.models.journal import Journal
from structprune.runs.mask import mask

RUN = {
    "method": "unstructured", "masking.score": "wanda", "calibration.windows": 3, "calibration.held_out": 2,
    "calibration.length": 16, "calibration.interval": 25,
}  # fmt: skip
BLOCK, EXPERT = 1, 4


@pytest.fixture
def avoided(tiny_checkpoint):
    """A model of which no token chooses one expert: its row of the router points away from every token."""
    model = load_model(tiny_checkpoint("llada-moe"))
    block = model.blocks[BLOCK]
    with torch.no_grad():
        block.part("mlp_norm").weight.fill_(1.0)
        block.part("router").weight[EXPERT] = 0.0  # a share of e^0, below two of the others'
        block.part("router").weight[[0, 1]] = torch.eye(32)[0] * torch.tensor([[3.0], [-3.0]])
        block.part("router").weight[[2, 3]] = torch.eye(32)[1] * torch.tensor([[3.0], [-3.0]])
    return model


def masked(model, text, journal=None, **changes):
    values = RUN | {key.replace("__", "."): value for key, value in changes.items()}
    config = Config.load(overrides=values | {"calibration.source": str(text)})
    return mask(model, config, **({} if journal is None else {"journal": journal}))


@pytest.mark.parametrize("score", ["wanda", "sparsegpt", "ria"])
@pytest.mark.parametrize("order", ["sequential", "one-shot"])
def test_an_expert_without_tokens_is_masked_by_its_weights(avoided, text_path, score, order):
    result = masked(avoided, text_path, masking__score=score, masking__order=order)
    unseen = {each["block"]: each["experts"] for each in result.report["unseen_experts"]}
    assert EXPERT in unseen[BLOCK] and len(unseen[BLOCK]) < 6
    if score == "wanda":
        weight = avoided.blocks[BLOCK].part(f"down.{EXPERT}").weight.abs()  # (O, C)
        keep = result.masks.kept(f"model.layers.{BLOCK}.mlp.experts.{EXPERT}.down_proj.weight")  # (O, C)
        ranks = weight.argsort(1).argsort(1)  # (O, C)
        assert torch.equal(keep, ranks >= weight.shape[1] // 2)
    zeros = [part for name, part in result.report["sparsity"]["tensors"].items() if "experts" in name]
    assert len(zeros) == 54 and all(abs(share - 0.5) < 0.01 for share in zeros)


def test_statistics_of_unseen_experts_become_even(avoided):
    block = Adapter(avoided).blocks[0]
    sizes = {name: block[roles[0]].in_features for name, roles in block.readers.items()}
    for even in (torch.ones, torch.eye):
        statistics = {name: 2 * torch.ones_like(even(size)) for name, size in sizes.items()}
        for name in ("mlp_input.3", "activated.3"):
            statistics[name].zero_()
        assert fill_unseen(block, statistics) == [3]
        for name in ("mlp_input.3", "activated.3"):
            assert torch.equal(statistics[name], even(len(statistics[name])))
        assert (statistics["mlp_input.2"] == 2).all()
    assert fill_unseen(block, {}) == []


def test_a_run_that_goes_on_knows_which_experts_were_unseen(tiny_checkpoint, text_path, tmp_path):
    model, journal = load_model(tiny_checkpoint("llada-moe")), Journal(tmp_path / "journal")
    first, again = (masked(model, text_path, journal) for _ in range(2))
    assert json.dumps(first.report["unseen_experts"]) == json.dumps(again.report["unseen_experts"])
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name


@pytest.mark.parametrize("target", ["dense", "layer"])
def test_a_refit_of_experts_lowers_their_held_out_error(tiny_checkpoint, text_path, target):
    result = masked(
        load_model(tiny_checkpoint("llada-moe")), text_path, calibration__windows=12, reconstruct__target=target
    )
    fits = [fit for fit in result.report["refit"] if "." in fit["kind"]]
    errors = [fit["error"] for fit in fits if fit["damping"] is not None]
    assert len(fits) == 54 and len(errors) > 20 and max(errors) < 1 and sum(errors) / len(errors) < 0.9
