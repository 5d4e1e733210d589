"""The refit of kept weights inside a whole run: against its defining equations, and on the trained model."""

import pytest
import torch

from structprune import Config, load_model
from structprune.assets import model_directory
from structprune.mask_pipeline import mask
from structprune.models.adapter import Adapter

KEYS = {"method": "unstructured", "masking.score": "wanda", "masking.arm": "masked", "masking.ratio": 0.5}


@torch.no_grad()
def reads(model, ids) -> list[torch.Tensor]:
    """What the query projection of every block reads on a plain forward pass, (R*T, C) fp64."""
    found = []
    handles = [
        block["query"].register_forward_pre_hook(lambda module, given: found.append(given[0].double().flatten(0, 1)))
        for block in Adapter(model).blocks
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return found


def sink_weights(model, calibration, sink) -> torch.Tensor:
    from structprune.statistics.rows import arm_weights, measure_mass

    mass = measure_mass(Adapter(model), calibration.fit)
    return arm_weights(mass, "masked+sink", sink).flatten()  # (R*T,)


@pytest.mark.parametrize("target, arm", [("dense", "masked"), ("layer", "masked"), ("dense", "masked+sink")])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_kept_weights_solve_their_rows(family, target, arm, tiny_checkpoint, tiny_calibration):
    """(W·C - W_new·G)_K = λ mean(diag G_KK) (W_new - W)_K on fit rows; the error is that of held-out masked tokens."""
    dense = load_model(tiny_checkpoint(family))
    calibration = tiny_calibration(dense)
    config = Config.load(
        None, KEYS | {"reconstruct.target": target, "reconstruct.arm": arm, "reconstruct.damping": [0.1]}
    )
    made = mask(dense, config, calibration)
    fit = calibration.fit.noisy_ids.flatten(0, 1)
    omega = sink_weights(dense, calibration, config.sink).double() if arm.endswith("sink") else torch.ones(fit.numel())
    hats, wanted = reads(made.model, fit), reads(dense, fit)  # the masked prefix is whole in the finished model
    clean, noisy = calibration.check.input_ids, calibration.check.noisy_ids
    masked = ((noisy == dense.config.mask_token_id) & (clean[:, None] != noisy)).flatten()
    held_hats, held = (reads(model, noisy.flatten(0, 1)) for model in (made.model, dense))
    moved = 0
    for before, after in zip(Adapter(dense).blocks, Adapter(made.model).blocks):
        old, new = before["query"].weight.detach().double(), after["query"].weight.detach().double()
        kept = made.masks.kept(f"{after.names['query']}.weight")
        chosen = next(f for f in made.report["refit"] if (f["block"], f["kind"]) == (after.index, "query"))
        plain, index = old * kept, after.index
        x_hat = hats[index] * omega[:, None]
        x = x_hat if target == "layer" else wanted[index] * omega[:, None]
        goal, check_hat = held_hats[index] if target == "layer" else held[index], held_hats[index]
        errors = [((check_hat @ w.T - goal @ old.T)[masked] ** 2).sum().item() for w in (new, plain)]
        assert chosen["error"] == pytest.approx(errors[0] / errors[1], rel=1e-3, abs=1e-5) and chosen["error"] <= 1
        if chosen["damping"] is None:
            assert torch.equal(new, plain)
            continue
        moved += 1
        gram = x_hat.T @ x_hat
        left = old @ x.T @ x_hat - new @ gram
        right = 0.1 * (gram.diagonal() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True) * (new - plain)
        assert (left - right)[kept].norm() < 1e-4 * left[kept].norm() and left[kept].norm() > 1e-3 * gram.norm()
    assert moved


def test_targets_arms_and_rows_of_the_refit_matter(tiny_checkpoint, tiny_calibration):
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
