"""The refit's driver against a plain walk through both models, and whole runs against plain removal."""

from dataclasses import replace

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import Config, ReconstructSettings, SinkSettings
from structprune.evaluation.nelbo import masked_nelbo
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.refit.products import UNCHANGED, LayerFit
from structprune.refit.reconstruct import Reconstructor
from structprune.runs.prune import Pruner, prune
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
    return Reconstructor(scan, settings or ReconstructSettings())


def plain_refit(model, plan, calibration, settings):
    """Refit by lstsq, all rows at once: (dense block, kind) -> whether it changed, error, weight (O, K) and bias."""
    dense, constant = Adapter(model), settings.constant or settings.mode == "bias"
    small = Adapter(apply_plan(model, plan, constant))
    fit = scan_rows(Scan(dense, calibration.fit, SINK), settings.arm)
    check = arm_rows(calibration.check, "masked", SINK, None, MASK)
    omega = torch.ones(fit.ids.shape) if fit.weight is None else fit.weight
    sides = [(fit.ids, omega), (check.ids, check.masked.float())]
    wide = [dense.model.embedding(ids) for ids, _ in sides]  # the dense model's residual stream
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
            for (_, weight), x, target in zip(sides, narrow, targets):
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


SETTINGS = {
    "default": {},
    "layer": {"target": "layer"},
    "not relative": {"relative": False},
    "constant": {"constant": True},
    "sink arm": {"arm": "masked+sink"},
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
    plan, settings = make_plan(Adapter(model)), ReconstructSettings(damping=(DAMPING,), **SETTINGS[name])
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
    for tile in (384, 4):  # at 4, tiles below the diagonal are not computed
        monkeypatch.setitem(activations.GRAM_TILE, "cpu", tile)
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


def run_config(text_path, **overrides) -> Config:
    base = {
        "calibration.source": str(text_path), "calibration.windows": 6, "calibration.held_out": 3,
        "calibration.length": 24,
        "calibration.steps": 3, "calibration.interval": 1, "calibration.batch": 3, "structured.ratio": 0.4,
        "structured.split": "equal", "structured.allocation": "uniform",
    }  # fmt: skip
    return Config.load(overrides=base | overrides)


@pytest.mark.parametrize("family, score", [("llada", "obs"), ("dream", "wanda")])
def test_a_run_is_never_worse_than_plain_removal(tiny_checkpoint, text_path, family, score):
    model = load_model(tiny_checkpoint(family))
    report = prune(model, run_config(text_path, **{"structured.score": score})).report
    check = report["held_out_nelbo"]
    reached = check["dense"] + check["loss"]["mean"]
    assert reached == pytest.approx(min(check["refit"], check["plain_removal"]), rel=1e-6)
    assert check["kept"] == ("refit" if check["refit"] < check["plain_removal"] else "plain removal")
    assert len(report["refit"]) == 6 and all(fit["error"] <= 1 for fit in report["refit"])


def test_a_spoilt_refit_is_discarded(tiny_checkpoint, text_path, monkeypatch):
    model = load_model(tiny_checkpoint())

    def spoil(self, small, remaining):
        small.spoilt = True
        for block in Adapter(small).blocks:
            block["down"].weight.data.mul_(-3)
        return [LayerFit(0, "channels", 0.1, 0.5)]

    def nelbo(model, *args, **kwargs):  # a random model may gain by anything, so the loss is told
        value = masked_nelbo(model, *args, **kwargs)
        return replace(value, nelbo=value.nelbo * 0 + (8 if hasattr(model, "spoilt") else 7))

    monkeypatch.setattr("structprune.refit.reconstruct.Reconstructor.refit", spoil)
    monkeypatch.setattr("structprune.runs.run.masked_nelbo", nelbo)
    pruned = prune(model, run_config(text_path))
    check = pruned.report["held_out_nelbo"]
    assert check["kept"] == "plain removal" and check["refit"] > check["plain_removal"] == 7
    plain = apply_plan(model, pruned.plan)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in pruned.model.state_dict().items())


@pytest.mark.parametrize("constant", [False, True])
def test_a_kept_refit_is_what_was_refitted(tiny_checkpoint, text_path, monkeypatch, constant):
    model, refit, states, losses = load_model(tiny_checkpoint()), Reconstructor.refit, [], iter((7, 8, 9))

    def watch(self, small, remaining):
        fits = refit(self, small, remaining)
        states.append({name: value.clone() for name, value in small.state_dict().items()})
        return fits

    def nelbo(model, *args, **kwargs):
        value = masked_nelbo(model, *args, **kwargs)
        return replace(value, nelbo=value.nelbo * 0 + next(losses))  # dense, refit, plain removal

    monkeypatch.setattr("structprune.refit.reconstruct.Reconstructor.refit", watch)
    monkeypatch.setattr("structprune.runs.run.masked_nelbo", nelbo)
    pruned = prune(model, run_config(text_path, **{"reconstruct.constant": constant}))
    check, state = pruned.report["held_out_nelbo"], pruned.model.state_dict()
    assert (check["kept"], check["refit"], check["plain_removal"]) == ("refit", 8, 9)
    assert state.keys() == states[0].keys()
    assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    plain = apply_plan(model, pruned.plan, constant).state_dict()
    moved = {name.split(".")[-2] for name in state if not torch.equal(state[name], plain[name])}
    assert moved == {"attn_out", "ff_out"}


@pytest.mark.parametrize("sequences", [2, 9])
def test_no_pass_of_a_run_has_more_tokens_than_it_may(tiny_checkpoint, text_path, monkeypatch, sequences):
    """Scores, their mass, refit and held-out checks: calibration.batch asks for 3 windows at 3 levels."""
    monkeypatch.setattr("structprune.statistics.scan.PASS_TOKENS", sequences * 24 + 23)
    model, sizes = load_model(tiny_checkpoint()), set()

    def see(module, args):
        if args and args[0].dim() == 3:  # (b, T, C); a last block and the head read masked positions only
            sizes.add(len(args[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        prune(model, run_config(text_path))
    finally:
        handle.remove()
    assert max(sizes) == sequences


def test_the_refit_can_be_switched_off(tiny_checkpoint, text_path):
    model = load_model(tiny_checkpoint())
    pruned = prune(model, run_config(text_path, **{"reconstruct.enabled": False}))
    assert pruned.report["refit"] == [] and pruned.report["held_out_nelbo"]["refit"] is None
    plain = apply_plan(model, pruned.plan)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in pruned.model.state_dict().items())


def test_a_report_names_the_ratio_it_was_asked_for(tiny_checkpoint, text_path):
    """One pruner serves many ratios; every report says its own."""
    pruner = Pruner(load_model(tiny_checkpoint()), run_config(text_path))
    reports = [pruner.prune(ratio).report for ratio in (0.3, None, 0.5)]
    assert [report["config"]["structured"]["ratio"] for report in reports] == [0.3, 0.4, 0.5]
    assert [report["ratio"] for report in reports] == pytest.approx([0.3, 0.4, 0.5], abs=0.03)
