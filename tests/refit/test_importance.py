"""How much rows matter to a refit: by hand, and by plain autograd on a tiny model of both families."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from structprune.bench.memory import predicted_peak
from structprune.calibration.batches import Calibration
from structprune.config import Config, ReconstructSettings, SinkSettings
from structprune.errors import UserError
from structprune.models import logits
from structprune.models.adapter import CONSUMER, Adapter
from structprune.refit.importance import at_predictions, certainties, importance, noise_importance, predicted_at
from structprune.refit.reconstruct import Reconstructor
from structprune.refit.row_weights import WeightedRows
from structprune.runs.pruner import Pruner
from structprune.runs.resolve import resolve_structured
from structprune.statistics.rows import scan_rows
from structprune.statistics.scan import Limits, Scan
from structprune.structured.plan import identity_plan
from structprune.structured.surgery import apply_plan

MASK, LENGTH = 2047, 12
BOTH = pytest.mark.parametrize("family", ["llada", "dream"])


@pytest.fixture
def calibration() -> Calibration:
    """Six fitted windows at two levels, and two held-out ones."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 90, (8, LENGTH), generator=generator)
    p = torch.tensor([0.25, 0.75]).expand(8, 2)  # (N, S)
    masked = torch.rand(8, 2, LENGTH, generator=generator) < p[..., None]  # (N, S, T)
    masked[..., 0] = masked[..., -1] = False
    return Calibration(ids, torch.where(masked, MASK, ids[:, None]), p.clone(), {}, held_out=2)


def scan_of(model, calibration, **limits):
    return Scan(Adapter(model), calibration, SinkSettings(), Limits(**limits))


def test_noise_importance_is_one_over_p_where_a_token_is_masked():
    masked = torch.tensor([[True, False, True, False], [False, True, False, False]])
    values = noise_importance(torch.tensor([0.5, 0.01]), masked, 4)
    assert values.tolist() == [[2.0, 0.0, 2.0, 0.0], [0.0, 4.0, 0.0, 0.0]]  # at least one of four tokens
    assert noise_importance(torch.tensor([0.5, 0.01]), masked, 2)[1].tolist() == [0.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "shifted, expected",
    [
        (False, [[0.5, 1.0, 1.5, 1.0], [1.0, 1.0, 1.0, 1.0]]),
        (True, [[0.5, 1.5, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]),  # the first token is predicted from its own position
    ],
)
def test_values_move_to_where_predictions_are_made(shifted, expected):
    masked = torch.tensor([[True, False, True, False], [False, False, False, False]])
    values = torch.tensor([[0.2, 0.0, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(at_predictions(values, masked, shifted), torch.tensor(expected))
    assert predicted_at(masked, shifted).sum() == 2


@BOTH
def test_certainty_is_the_probability_of_the_likeliest_token(tiny_model, calibration, family, monkeypatch):
    model = tiny_model(family)
    scan = scan_of(model, calibration.fit, batch=5)
    rows = scan_rows(scan, "masked")
    with torch.no_grad():
        prediction = predictions(model, rows.ids).softmax(-1).amax(-1)  # (R, T) at the tokens themselves
    monkeypatch.setattr(logits, "LOGIT_BYTES", 2 * 4 * 2048 * 3)  # three positions at once
    values = certainties(scan, rows)
    assert torch.allclose(values[rows.masked], prediction[rows.masked], rtol=1e-4)
    assert not values[~rows.masked].any() and values[rows.masked].min() > 0
    table = importance(scan, rows, "certainty")[None]
    assert torch.allclose(table, at_predictions(values, rows.masked, model.shifted))


def predictions(model, ids):
    """Logits (R, T, V) of every token at its own place."""
    values = model(ids).logits
    return torch.cat((values[:, :1], values[:, :-1]), dim=1) if model.shifted else values


def gradient_by_hand(model, calibration, rows, key):
    """Squared norms (R, T) of the gradient of Σ CE / p with respect to one consumer's output."""
    outputs = []
    linear = Adapter(model).blocks[key[0]][CONSUMER[key[1]]]
    handle = linear.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.enable_grad():
        tokens = calibration.input_ids.repeat_interleave(2, 0)[rows.masked]  # (M,)
        nats = F.cross_entropy(predictions(model, rows.ids)[rows.masked], tokens, reduction="none")  # (M,)
        p = calibration.mask_probability.flatten()[rows.masked.nonzero(as_tuple=True)[0]]  # (M,)
        (slope,) = torch.autograd.grad((nats / p).sum(), outputs)
    handle.remove()
    return slope.pow(2).sum(-1)


@BOTH
@pytest.mark.parametrize("budget", [2**30, 0])
def test_gradient_importance_is_that_of_plain_autograd(tiny_model, calibration, family, budget):
    """Also where blocks are computed again in the backward pass."""
    model = tiny_model(family)
    fit = calibration.fit
    scan = scan_of(model, fit, batch=5, budget=budget)
    rows = scan_rows(scan, "masked")
    table = importance(scan, rows, "gradient")
    assert set(table) == {(index, kind) for index in range(3) for kind in ("attention", "channels")}
    for key in ((0, "attention"), (1, "channels"), (2, "attention")):
        expected = gradient_by_hand(model, fit, rows, key)
        assert torch.allclose(table[key], expected / expected.mean(), rtol=1e-3, atol=1e-5), key
    assert all(each.requires_grad and each.grad is None for each in model.parameters())


def test_only_fitted_rows_are_weighted(tiny_model, calibration):
    """The held-out rows, which choose the damping, count masked tokens alike under every weighting."""
    scan = scan_of(tiny_model(), calibration)
    plain, noise = (
        WeightedRows(scan, ReconstructSettings(visible=0.5, weighting=name)) for name in ("uniform", "noise")
    )
    fitted, held_out, device = slice(0, 12), slice(12, 16), torch.device("cpu")
    assert plain.fitted == 12 and len(plain.ids) == 16
    for predicting in (False, True):
        pair = [each.weight(held_out, predicting, device) for each in (plain, noise)]
        assert torch.equal(*pair)
    before, after = (each.weight(fitted, False, device) for each in (plain, noise))
    masked = plain.ids[fitted] == MASK  # (R1, T)
    assert torch.equal(before[~masked], after[~masked]) and set(before[~masked].tolist()) == {0.5}
    ratio = after.pow(2) / before.pow(2)  # importance, as weights are squared in the sums
    low, high = ratio[0::2][masked[0::2]], ratio[1::2][masked[1::2]]  # p of 0.25 and 0.75
    assert torch.allclose(low / high[0], torch.tensor(3.0)) and torch.allclose(ratio[masked].mean(), torch.tensor(1.0))


@pytest.mark.parametrize("weighting", ["noise", "certainty", "gradient"])
def test_a_refit_reads_the_weights(tiny_model, calibration, weighting):
    model = tiny_model()
    plan = identity_plan(Adapter(model))
    narrow = replace(plan, blocks=tuple(replace(each, channels=each.channels[::2]) for each in plan.blocks))

    def consumer(name: str) -> torch.Tensor:
        small = apply_plan(model, narrow)
        # held-out rows are few, and would choose no refit at all
        settings = ReconstructSettings(damping=(0.1,), weighting=name)
        Reconstructor(scan_of(model, replace(calibration, held_out=4)), settings).refit(small)
        return Adapter(small).blocks[1][CONSUMER["channels"]].weight

    uniform, weighted, again = consumer("uniform"), consumer(weighting), consumer(weighting)
    assert torch.equal(weighted, again) and not torch.allclose(uniform, weighted, rtol=1e-3)


@pytest.mark.parametrize("weighting", ["noise", "gradient"])
def test_a_calibration_without_mask_probabilities_is_refused_first(tiny_model, calibration, weighting):
    config = Config.load(overrides={"reconstruct.weighting": weighting, "structured.score": "magnitude"})
    with pytest.raises(UserError, match=f"reconstruct.weighting = {weighting} needs mask probabilities"):
        Pruner(tiny_model(), config, replace(calibration, mask_probability=None))


def test_certainty_needs_no_mask_probabilities(tiny_model, calibration):
    scan = scan_of(tiny_model(), replace(calibration, mask_probability=None).fit)
    assert importance(scan, scan_rows(scan, "masked"), "certainty")[None].shape == (12, LENGTH)


def test_offloaded_weights_have_no_gradients(tiny_model, cpu_accelerator):
    config = Config.load(overrides={"reconstruct.weighting": "gradient", "memory.offload": True})
    with pytest.raises(
        UserError, match=r"reconstruct.weighting = gradient needs a backward pass, which memory.offload"
    ):
        resolve_structured(config, tiny_model())


def test_the_dry_run_counts_a_backward_pass(tiny_model):
    model = tiny_model()
    peaks = []
    for name in ("uniform", "certainty", "gradient"):
        # targets that are computed again leave the pass as the largest part
        keys = {"reconstruct.weighting": name, "memory.budget_gb": 1e-6, "calibration.length": 64}
        request = resolve_structured(Config.load(overrides=keys), model)
        peaks.append(predicted_peak(Adapter(model), Adapter(model), request, torch.float32)["refit"])
    assert peaks[0] == peaks[1] < peaks[2] and peaks[2] > logits.LOGIT_BYTES


def test_clean_text_has_no_predictions_to_weigh(tiny_model):
    config = Config.load(overrides={"reconstruct.weighting": "noise", "reconstruct.arm": "clean"})
    with pytest.raises(
        UserError, match=r"reconstruct.weighting = noise has no effect without a masked reconstruct.arm"
    ):
        resolve_structured(config, tiny_model())
