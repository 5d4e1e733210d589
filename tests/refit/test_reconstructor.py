"""The refit's driver against a plain walk through both models."""

from dataclasses import replace

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import ReconstructSettings, SinkSettings
from structprune.models.adapter import Adapter
from structprune.models.layers_structprune import Layout
from structprune.refit.products import UNCHANGED
from structprune.refit.reconstruct import Reconstructor
from structprune.statistics import activations
from structprune.statistics.rows import arm_rows, scan_rows
from structprune.statistics.scan import Limits, Scan
from structprune.structured.plan import BlockPlan, Plan
from structprune.structured.surgery import apply_plan

MASK, LENGTH = 2047, 12
SINK = SinkSettings(alpha=0.7, kappa=0.5)
ROLE = {"attention": "attention_output", "channels": "down"}
DAMPING = 0.05


@pytest.fixture
def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 90, (10, LENGTH), generator=generator)
    noisy = ids[:, None].repeat(1, 2, 1)  # (N, S, T)
    noisy[torch.rand(noisy.shape, generator=generator) < 0.5] = MASK
    return Calibration(ids, noisy, torch.full((10, 2), 0.5), {}, held_out=3)


def half_plan(adapter: Adapter) -> Plan:
    """Every block keeps half of its channels, and half of its heads or one query head less of each KV group."""
    heads = (0, 3) if adapter.family.name == "llada" else (0, 2, 3, 4)
    kv = heads if adapter.family.name == "llada" else (0, 1)
    blocks = tuple(BlockPlan(heads, kv, tuple(range(index, 48, 2))) for index in (0, 1, 0))
    return Plan(adapter.family.name, blocks)


def gap_plan(adapter: Adapter) -> Plan:
    """`half_plan` without the first block's MLP, the second block, and the last one's attention."""
    first, _, last = half_plan(adapter).blocks
    without_heads = replace(last, query_heads=(), kv_heads=())
    return Plan(adapter.family.name, (replace(first, channels=()), BlockPlan((), (), ()), without_heads))


def read_all(block, kind, x, rotary):
    return block.module.mix(x, rotary) if kind == "attention" else block.module.activate(x)


def reconstructor(model, calibration, settings=None, **limits) -> Reconstructor:
    scan = Scan(Adapter(model), calibration, SINK, Limits(**limits))
    return Reconstructor(scan, settings or ReconstructSettings(**CONSUMERS))


def row_weights(model, plan, index, sides, omega, settings):
    """ω of fit and held-out rows: behind the last attention only where something is predicted."""
    fit, check = sides
    last = max(place for place, block in enumerate(plan.blocks) if "attention" in block.kinds)
    predicting = []
    for masked in (fit.masked, check.masked):
        at = torch.zeros_like(masked)
        for row, token in masked.nonzero().tolist():
            at[row, max(token - 1, 0) if model.shifted else token] = True
        predicting.append(at)
    held_out = predicting[1] if index >= last else check.masked
    if settings.arm == "clean":
        return omega, held_out.float()
    if index >= last:
        return omega * predicting[0], held_out.float()
    return omega * torch.where(fit.masked | predicting[0], 1.0, settings.visible), held_out.float()


def plain_refit(model, plan, calibration, settings):
    """Refit by lstsq, all rows at once: (dense block, kind) -> whether it changed, error, weight (O, K) and bias."""
    dense, constant = Adapter(model), settings.constant or settings.mode == "bias"
    small = Adapter(apply_plan(model, plan, constant))
    fit = scan_rows(Scan(dense, calibration.fit, SINK), settings.arm)
    check = arm_rows(calibration.check, "masked", SINK, None, MASK, Layout())
    omega = torch.ones(fit.ids.shape) if fit.weight is None else fit.weight
    wide = [dense.model.embedding(rows.ids) for rows in (fit, check)]  # the dense model's residual stream
    narrow = [x.clone() for x in wide]  # the pruned prefix's
    rotary, fits = dense.model.rotary(LENGTH, "cpu"), {}
    for index in range(3):
        for kind, role in ROLE.items():
            full = dense.blocks[index][role]
            systems, targets = [], [full(read_all(dense.blocks[index], kind, x, rotary)) for x in wide]
            if kind not in plan.blocks[index].kinds:  # only the dense stream goes on
                wide = [x + target for x, target in zip(wide, targets)]
                continue
            block = small.blocks[plan.remaining.index(index)]
            linear = block[role]
            for weight, x, target in zip(
                row_weights(model, plan, index, (fit, check), omega, settings), narrow, targets
            ):
                if settings.target == "layer":
                    target = full(read_all(dense.blocks[index], kind, x, rotary))
                if settings.relative:
                    weight = weight / x.pow(2).mean(-1).sqrt()
                inputs = read_all(block, kind, x, rotary)
                inputs = torch.cat((inputs, torch.ones_like(inputs[..., :1])), -1) if constant else inputs
                left, right = (
                    (inputs * weight[..., None]).flatten(0, 1).double(),
                    (target * weight[..., None]).flatten(0, 1).double(),
                )
                systems.append((left, right))
            start = linear.weight.double()
            start = torch.cat((start, torch.zeros(len(start), 1)), 1) if constant else start
            (left, right), (check_left, check_right) = systems
            if settings.mode == "bias":
                new, square = start.clone(), left[:, -1:]
                new[:, -1:] += (right - left @ start.T).T @ square / (square**2).sum()
            else:
                penalty = DAMPING * left[:, : linear.in_features].pow(2).sum(0).mean()
                eye = penalty.sqrt() * torch.eye(left.shape[1]).double()
                new = torch.linalg.lstsq(
                    torch.cat((left, eye)), torch.cat((right, penalty.sqrt() * start.T))
                ).solution.T
            errors = [(check_left @ w.T - check_right).pow(2).sum() for w in (start, new)]
            chosen = new if errors[1] < errors[0] else start
            linear.weight.copy_(chosen[:, : linear.in_features])
            if constant:
                linear.bias.copy_(chosen[:, -1])
            error = (min(errors) / errors[0]).item()
            fits[index, kind] = (chosen is new, error, linear.weight.clone(), linear.bias)
            narrow = [x + linear(read_all(block, kind, x, rotary)) for x in narrow]
            wide = [x + target for x, target in zip(wide, targets)]
    return fits


CONSUMERS = {"producers": False, "stream": 0}  # what else is refitted has tests of its own
SETTINGS = {
    "consumers": {},
    "layer": {"target": "layer"},
    "not relative": {"relative": False},
    "constant": {"constant": True},
    "sink arm": {"arm": "masked+sink"},
    "visible": {"visible": 0.5},
    "clean arm, layer": {"arm": "clean", "target": "layer"},
    "bias": {"mode": "bias", "target": "layer", "relative": False},
    "bias, dense": {"mode": "bias"},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("make_plan", [half_plan, gap_plan])
@torch.no_grad()
def test_the_driver_walks_both_models(tiny_model, calibration, family, name, make_plan):
    model = tiny_model(family)
    plan, settings = make_plan(Adapter(model)), ReconstructSettings(damping=(DAMPING,), **CONSUMERS | SETTINGS[name])
    small = apply_plan(model, plan, settings.constant or settings.mode == "bias")
    fits = reconstructor(model, calibration, settings).refit(small, plan.remaining)
    expected = plain_refit(model, plan, calibration, settings)
    keys = [(index, kind) for index, block in enumerate(plan.blocks) for kind in block.kinds]
    assert [(fit.block, fit.kind) for fit in fits] == keys == list(expected)
    assert len(keys) == (6 if make_plan is half_plan else 2)
    # on clean rows nothing is missing before the first attention, and the other linear gains nothing
    assert any(fit.damping != UNCHANGED for fit in fits) or (make_plan is gap_plan and settings.arm == "clean")
    for fit, (moved, error, weight, bias) in zip(fits, expected.values()):
        linear = Adapter(small).blocks[plan.remaining.index(fit.block)][ROLE[fit.kind]]
        assert (fit.damping != UNCHANGED) == moved, (fit, error)
        assert fit.error == pytest.approx(error, rel=1e-3) and fit.error <= 1
        assert torch.allclose(linear.weight, weight, atol=2e-3)
        assert bias is None or torch.allclose(linear.bias, bias, atol=2e-3)


@pytest.mark.parametrize("make_plan", [half_plan, gap_plan])
@torch.no_grad()
def test_small_budgets_and_other_batches_give_the_same(tiny_model, calibration, make_plan):
    model = tiny_model()
    plan, logits = make_plan(Adapter(model)), []
    for windows, budget in ((1, 2**30), (3, 0), (2, 20 * LENGTH * 32 * 4)):
        small = apply_plan(model, plan)
        reconstructor(model, calibration, windows=windows, budget=budget).refit(small, plan.remaining)
        logits.append(small(calibration.noisy_ids[0]).logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-3) and torch.allclose(logits[0], logits[2], atol=1e-3)


@torch.no_grad()
def test_half_of_a_gram_is_enough_for_a_refit(tiny_model, calibration, monkeypatch):
    model = tiny_model()
    plan, logits, dampings = half_plan(Adapter(model)), [], []
    for tile in ((384, 4096), (4, 64)):  # at 4, tiles below the diagonal are not computed
        monkeypatch.setitem(activations.PRODUCT_TILE, "cpu", tile)
        small = apply_plan(model, plan)
        fits = reconstructor(model, calibration).refit(small)
        logits.append(small(calibration.noisy_ids[0]).logits)
        dampings.append([fit.damping for fit in fits])
    assert torch.allclose(*logits, atol=1e-3) and dampings[0] == dampings[1]
    assert any(damping != UNCHANGED for damping in dampings[0])


@torch.no_grad()
def test_one_reconstructor_refits_many_plans(tiny_model, calibration):
    model = tiny_model()
    plan = half_plan(Adapter(model))
    other = replace(plan, blocks=tuple(replace(block, channels=tuple(range(30))) for block in plan.blocks))
    shared, logits = reconstructor(model, calibration), []
    for each in (plan, other, plan):
        small = apply_plan(model, each)
        shared.refit(small)
        logits.append(small(calibration.noisy_ids[0]).logits)
    assert torch.equal(logits[0], logits[2]) and not torch.allclose(logits[0], logits[1], atol=1e-2)
