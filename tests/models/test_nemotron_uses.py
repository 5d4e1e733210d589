"""Nemotron-Labs-Diffusion: what its two uses weigh in statistics, refits and gradients."""

import json
from dataclasses import replace

import pytest
import torch

from structprune import Config
from structprune.calibration.batches import Calibration
from structprune.config import ModelSettings, ReconstructSettings, SinkSettings
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.models.encode import encode_rows
from structprune.refit.row_weights import WeightedRows
from structprune.runs.resolve import resolve_masking, resolve_structured, with_causal
from structprune.runs.sinks import measure_sinks
from structprune.sinks.settings import SinkRun
from structprune.statistics.gradients import gradient_sums
from structprune.statistics.moments import consumer_moments
from structprune.statistics.norms import one_shot_norms
from structprune.statistics.rows import scan_rows
from structprune.statistics.scan import Scan
from tests.conftest import MASK_ID

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_model):
    """A random model with blocks of four tokens."""
    return tiny_model("nemotron-labs")


@pytest.fixture
def windows() -> Calibration:
    """Three windows at two noise levels."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 2000, (3, 11), generator=generator)  # (N, T)
    p = torch.tensor([[0.3, 0.6], [0.4, 0.7], [0.5, 0.9]])  # (N, L)
    noisy = ids[:, None].repeat(1, 2, 1)  # (N, L, T)
    noisy[torch.rand(noisy.shape, generator=generator) < p[..., None]] = MASK_ID
    return Calibration(ids, noisy, p, {}, held_out=0)


@pytest.mark.parametrize("causal", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("arm", ["masked", "masked+sink"])
@torch.no_grad()
def test_moments_and_norms_weigh_both_uses(model, windows, arm, causal):
    """By hand from the inputs of every row, whose squares weigh 1 in the noisy half and `causal` in the clean one."""
    scan = Scan(Adapter(model), windows, SinkSettings(), causal=causal)
    rows, half = scan_rows(scan, arm), torch.arange(22) < 11
    plain = scan_rows(replace(scan, causal=1.0), arm).weight
    plain = torch.ones(rows.ids.shape) if plain is None else plain  # (R, S)
    squares = plain**2 * torch.where(half, 1.0, causal)  # (R, S)
    assert torch.allclose(squares, torch.ones(()) if rows.weight is None else rows.weight**2, atol=1e-6)
    x = []
    handle = model.blocks[1].part("down").register_forward_pre_hook(lambda _, args: x.append(args[0]))
    encode_rows(model, rows.ids)
    handle.remove()
    expected = (squares[..., None] * x[0] ** 2).sum((0, 1)).double()  # (C,)
    assert torch.allclose(consumer_moments(scan, arm)[1, "down"].squared_norm, expected, rtol=1e-4)
    assert torch.allclose(one_shot_norms(scan, arm)[1, "activated"] ** 2, expected, rtol=1e-4)


@pytest.mark.parametrize("causal", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_both_losses(model, windows, causal):
    model.config.ar_loss_weight = causal * 10 / 11  # the training loss is a mean of 10 next tokens
    scan, weight = Scan(Adapter(model), windows, SinkSettings(), causal=causal), model.blocks[0].part("down").weight
    (sums,) = gradient_sums(scan, scan_rows(scan, "masked"), [weight])
    clean, p = windows.input_ids.repeat_interleave(2, 0), windows.mask_probability.flatten()  # (R, T), (R,)
    loss = model(windows.noisy_ids.flatten(0, 1), labels=clean, mask_probability=p).loss
    (expected,) = torch.autograd.grad(loss, weight)
    assert expected.abs().max() > 1e-4 and torch.allclose(sums, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weights, given, resolved", [
    ((None, 1.0), None, 1.0), ((0.5, 1.0), None, 2.0), ((0.5, 1.0), 0.25, 0.25), ((None, 0.0), None, 0.0),
])  # fmt: skip
def test_the_weight_is_that_of_the_losses_unless_given(model, weights, given, resolved):
    model.config.dlm_loss_weight, model.config.ar_loss_weight = weights
    config = Config() if given is None else Config.load(overrides={"calibration.causal": given})
    assert with_causal(config, model).calibration.causal == resolved


def test_a_weight_is_refused_where_there_is_one_use(tiny_model):
    config = Config.load(overrides={"calibration.causal": 0.5})
    with pytest.raises(UserError, match="calibration.causal = 0.5 has no effect without a model that is causal too"):
        resolve_structured(config, tiny_model("sdar"))
    assert with_causal(Config(), tiny_model("sdar")) == Config()


def test_refits_check_both_uses(model, windows):
    """Of held-out rows masked tokens count, and all that are read causally; so does the head in fitted rows."""
    scan = Scan(Adapter(model), replace(windows, held_out=1), SinkSettings(), causal=0.25)
    rows = WeightedRows(scan, ReconstructSettings(visible=0.5))
    masked = rows.ids[:, :11] == MASK_ID  # (R, T)
    fitted = torch.where(masked[:4], 1.0, 0.5)  # (R1, T)
    whole = torch.cat((fitted, torch.full((4, 11), 0.5)), 1)  # (R1, S)
    assert torch.equal(rows.weight(slice(0, 4), False, CPU), whole)
    only = torch.cat((masked.float(), torch.full((6, 11), 0.5)), 1)  # (R, S)
    assert torch.equal(rows.weight(slice(0, 4), True, CPU), only[:4])
    for predicting in (False, True):
        assert torch.equal(rows.weight(slice(4, 6), predicting, CPU), only[4:])


def test_reverse_trajectories_are_refused(tiny_checkpoint, model, tmp_path):
    message = "is not possible for nemotron-labs: nemotron-labs's blocks begin with a token that was never a mask"
    with pytest.raises(UserError, match=f"sink.trajectory = reverse {message}, so use forward"):
        resolve_structured(Config.load(overrides={"sink.trajectory": "reverse"}), model)
    source = [str(tiny_checkpoint("nemotron-labs"))]
    small = {"sink": SinkSettings(), "windows": 2, "length": 16, "gen_length": 8}
    with pytest.raises(UserError, match=rf"a reverse trajectory \(--trajectory\) {message}, so use forward"):
        measure_sinks(source, SinkRun(**small), tmp_path / "both", ModelSettings(device="cpu"))
    del small["gen_length"]  # by default, noise levels are measured alone
    measure_sinks(source, SinkRun(**small), tmp_path / "forward", ModelSettings(device="cpu"))
    runs = json.loads((tmp_path / "forward" / "sinks.json").read_text(encoding="utf-8"))["runs"]
    assert [each["kind"] for each in runs] == ["forward"]


def test_a_weight_of_the_causal_use_that_nothing_reads_is_refused(model):
    keys = {"calibration.causal": 0.5, "reconstruct.enabled": False, "calibration.length": 11}
    with pytest.raises(UserError, match="calibration.causal = 0.5 has no effect without a score or refit that reads"):
        resolve_structured(Config.load(overrides=keys | {"structured.score": "magnitude"}), model)
    masks = keys | {"method": "unstructured", "masking.score": "magnitude"}
    with pytest.raises(UserError, match="calibration.causal = 0.5 has no effect without a score or refit that reads"):
        resolve_masking(Config.load(overrides=masks), model)
    assert resolve_structured(Config.load(overrides=keys | {"structured.score": "wanda"}), model)
