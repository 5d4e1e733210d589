"""The refit of kept weights inside a whole run: against its defining equations, and on the trained model."""

from functools import partial
from math import nan

import pytest
import torch

from structprune import Config, load_model
from structprune.assets import model_directory
from structprune.errors import UserError
from structprune.evaluation.nelbo import Nelbo
from structprune.masking.plain import PlainWeights
from structprune.models.adapter import READERS, Adapter
from structprune.runs import run as shared_run
from structprune.runs.mask import mask

KEYS = {"method": "unstructured", "masking.score": "wanda", "masking.arm": "masked", "masking.ratio": 0.5}


@torch.no_grad()
def reads(model, ids) -> dict:
    """What the linears of every block read on a plain forward pass: (block index, input) -> (R*T, C) fp64."""
    result, handles = {}, []

    def note(key, module, given):
        result[key] = given[0].double().flatten(0, 1)

    for block in Adapter(model).blocks:
        for name, roles in READERS.items():
            handles.append(block[roles[0]].register_forward_pre_hook(partial(note, (block.index, name))))
    model(ids)
    for handle in handles:
        handle.remove()
    return result


@pytest.fixture
def refit_kept(monkeypatch):
    """The refit stays whatever the whole model makes of it: on random weights it may well be no gain."""
    monkeypatch.setattr(PlainWeights, "swap", lambda self: None)


def sink_weights(model, calibration, sink) -> torch.Tensor:
    from structprune.statistics.rows import arm_weights, measure_mass
    from structprune.statistics.scan import Scan

    mass = measure_mass(Scan(Adapter(model), calibration.fit))
    return arm_weights(mass, "masked+sink", sink).flatten()  # (R*T,)


@pytest.mark.parametrize("target, arm", [("dense", "masked"), ("layer", "masked"), ("dense", "masked+sink")])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_kept_weights_solve_their_rows(family, target, arm, tiny_checkpoint, tiny_calibration, refit_kept):
    """(W·C - W_new·G)_K = λ mean(diag G_KK) (W_new - W)_K on fit rows, of every linear, with the inputs that the
    finished model gives it; the error is that of held-out masked tokens."""
    dense = load_model(tiny_checkpoint(family))
    calibration = tiny_calibration(dense)
    changes = {"target": target, "arm": arm, "damping": [0.1], "relative": False}
    config = Config.load(None, KEYS | {f"reconstruct.{key}": value for key, value in changes.items()})
    made = mask(dense, config, calibration)
    fit = calibration.fit.noisy_ids.flatten(0, 1)
    omega = sink_weights(dense, calibration, config.sink).double() if arm.endswith("sink") else torch.ones(fit.numel())
    hats, expected = reads(made.model, fit), reads(dense, fit)
    clean, noisy = calibration.check.input_ids, calibration.check.noisy_ids
    masked = ((noisy == dense.config.mask_token_id) & (clean[:, None] != noisy)).flatten()
    held_hats, held = (reads(model, noisy.flatten(0, 1)) for model in (made.model, dense))
    moved = set()
    for key, role in ((place, role) for place in hats for role in READERS[place[1]]):
        name = Adapter(dense).blocks[key[0]].names[role]
        old, new = (model.get_parameter(f"{name}.weight").detach().double() for model in (dense, made.model))  # (O, C)
        kept = made.masks.kept(f"{name}.weight")
        chosen = next(f for f in made.report["refit"] if (f["block"], f["kind"]) == (key[0], role))
        plain = old * kept
        x_hat = hats[key] * omega[:, None]
        x = x_hat if target == "layer" else expected[key] * omega[:, None]
        goal = (held_hats if target == "layer" else held)[key]
        errors = [((held_hats[key] @ w.T - goal @ old.T)[masked] ** 2).sum().item() for w in (new, plain)]
        assert chosen["error"] == pytest.approx(errors[0] / errors[1], rel=1e-3, abs=1e-5) and chosen["error"] <= 1
        if chosen["damping"] is None:
            assert torch.equal(new, plain)
            continue
        moved.add(role)
        gram = x_hat.T @ x_hat
        left = old @ x.T @ x_hat - new @ gram
        right = 0.1 * (gram.diagonal() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True) * (new - plain)
        began = (old @ x.T @ x_hat - plain @ gram)[kept].norm()
        assert (left - right)[kept].norm() < 1e-3 * began and right[kept].norm() > 0.005 * began, key
    assert {"query", "up", "down"} <= moved


@pytest.mark.parametrize("refit, budget", [(4.0, 4.0), (4.0, 1e-6), (3.25, 4.0)])
def test_the_whole_model_decides_on_the_refit(refit, budget, tiny_checkpoint, tiny_calibration, monkeypatch):
    """Where held-out NELBO gains nothing, the masked weights before their refit are what is left."""
    dense = load_model(tiny_checkpoint("llada"))
    down = dense.blocks[2].part("down").weight.detach()  # (C, M)
    means = {"dense": 3.0, "plain": 3.5, "refit": refit}

    def judged(model, ids, *noise, **given):
        weight = model.blocks[2].part("down").weight  # (C, M)
        kind = (
            "dense" if torch.equal(weight, down) else "plain" if torch.equal(weight, down * (weight != 0)) else "refit"
        )
        return Nelbo(torch.full((len(ids),), means[kind]), torch.ones(len(ids)), torch.ones(len(ids)))

    monkeypatch.setattr(shared_run, "masked_nelbo", judged)
    config = Config.load(None, KEYS | {"memory.budget_gb": budget})
    made = mask(dense, config, tiny_calibration(dense))
    check, kept = made.report["held_out_nelbo"], "refit" if refit < 3.5 else "plain masks"
    assert (check["kept"], check["masked"]) == (kept, min(refit, 3.5))
    assert (check["refit"], check["plain_masks"], check["dense"]) == (refit, 3.5, 3.0)
    plain = [
        torch.equal(made.model.get_parameter(name), dense.get_parameter(name) * made.masks.kept(name))
        for name in made.masks.shapes
    ]
    assert all(plain) if kept == "plain masks" else not any(plain)


@pytest.mark.parametrize("plain, refit, kept", [(nan, 4.0, "refit"), (3.5, nan, "plain masks"), (nan, nan, None)])
def test_a_loss_that_is_no_number_is_never_kept(plain, refit, kept, tiny_checkpoint, tiny_calibration, monkeypatch):
    dense = load_model(tiny_checkpoint("llada"))
    losses = iter([3.0, refit, plain])  # as they are asked for

    def judged(model, ids, *noise, **given):
        return Nelbo(torch.full((len(ids),), next(losses)), torch.ones(len(ids)), torch.ones(len(ids)))

    monkeypatch.setattr(shared_run, "masked_nelbo", judged)
    if kept is None:
        with pytest.raises(
            UserError,
            match="loss on held-out windows is nan in float32: the largest weight is",
        ):
            mask(dense, Config.load(None, KEYS), tiny_calibration(dense))
        return
    check = mask(dense, Config.load(None, KEYS), tiny_calibration(dense)).report["held_out_nelbo"]
    assert check["kept"] == kept and check["masked"] == (refit if kept == "refit" else plain)


def test_a_calibration_that_nothing_reads_is_refused(tiny_checkpoint, tiny_calibration):
    dense = load_model(tiny_checkpoint("llada"))
    keys = {"method": "unstructured", "masking.score": "magnitude", "calibration.held_out": 0}
    config = Config.load(None, keys | {"reconstruct.enabled": False})
    with pytest.raises(UserError, match="^nothing of this run looks at a calibration: leave it out"):
        mask(dense, config, tiny_calibration(dense))
    assert mask(dense, config).calibration is None


def test_targets_arms_and_rows_of_the_refit_matter(tiny_checkpoint, tiny_calibration, refit_kept):
    dense = load_model(tiny_checkpoint("llada"))
    calibration = tiny_calibration(dense)
    changes = [{}, {"reconstruct.target": "layer"}, {"reconstruct.arm": "clean"}, {"reconstruct.arm": "masked+sink"},
               {"reconstruct.relative": False}, {"reconstruct.damping": [3.0]}]  # fmt: skip
    made = [
        mask(dense, Config.load(None, KEYS | {"masking.order": "one-shot"} | each), calibration) for each in changes
    ]
    for index, one in enumerate(made):
        assert all(torch.equal(bits, made[0].masks.packed[name]) for name, bits in one.masks.packed.items())
        for other in made[:index]:
            assert not torch.equal(one.model.blocks[2].part("down").weight, other.model.blocks[2].part("down").weight)


@pytest.mark.slow
def test_a_refit_wins_back_quality_on_the_trained_model(tiny_calibration):
    """NELBO on held-out windows, same noise and same masks but for those of later blocks: lower, zeros still there."""
    dense = load_model(model_directory())
    calibration = tiny_calibration(dense, windows=6, held_out=6, length=64)
    keys = KEYS | {"masking.ratio": 0.85, "reconstruct.damping": [0.03, 0.3]}
    refitted = mask(dense, Config.load(None, keys), calibration)
    plain = mask(dense, Config.load(None, KEYS | {"masking.ratio": 0.85, "reconstruct.enabled": False}), calibration)
    with_it, without = (made.report["held_out_nelbo"] for made in (refitted, plain))
    assert with_it["dense"] == without["dense"] < with_it["masked"] < without["masked"] - 0.2
    assert sum(fit["error"] for fit in refitted.report["refit"]) / 35 < 0.8
    for block in Adapter(refitted.model).blocks:
        for role, name in block.names.items():
            kept = refitted.masks.kept(f"{name}.weight")
            assert torch.equal(block[role].weight != 0, kept)
            assert ((~kept).sum(1) == int(kept.shape[1] * 0.85)).all()
