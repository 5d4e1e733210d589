"""What whole runs do with the refit: against plain removal, switched off, at several ratios."""

from dataclasses import replace

import pytest
import torch

from structprune.config import Config
from structprune.evaluation.nelbo import masked_nelbo
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.refit.products import LayerFit
from structprune.refit.reconstruct import Reconstructor
from structprune.runs.prune import prune
from structprune.runs.pruner import Pruner
from structprune.structured.surgery import apply_plan


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
    roles = ("query", "key", "value", "attention", "gate", "up", "channels")
    places = [(block, role) for block in range(3) for role in roles][3:]  # nothing is missing before the first
    assert [(fit["block"], fit["kind"]) for fit in report["refit"]] == places
    assert all(fit["error"] <= 1 for fit in report["refit"])


def test_a_spoilt_refit_is_discarded(tiny_checkpoint, text_path, monkeypatch):
    model = load_model(tiny_checkpoint())

    def spoil(self, small, remaining, producers, _journal, _experts):
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
    model, refit, states, losses = load_model(tiny_checkpoint()), Reconstructor.refit, [], iter((7, 9, 8))

    def watch(self, small, remaining, producers, _journal, _experts):
        fits = refit(self, small, remaining, producers)
        states.append({name: value.clone() for name, value in small.state_dict().items()})
        return fits

    def nelbo(model, *args, **kwargs):
        value = masked_nelbo(model, *args, **kwargs)
        return replace(value, nelbo=value.nelbo * 0 + next(losses))  # dense, plain removal, refit

    monkeypatch.setattr("structprune.refit.reconstruct.Reconstructor.refit", watch)
    monkeypatch.setattr("structprune.runs.run.masked_nelbo", nelbo)
    pruned = prune(model, run_config(text_path, **{"reconstruct.constant": constant}))
    check, state = pruned.report["held_out_nelbo"], pruned.model.state_dict()
    assert (check["kept"], check["refit"], check["plain_removal"]) == ("refit", 8, 9)
    assert state.keys() == states[0].keys()
    assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    plain = apply_plan(model, pruned.plan, constant).state_dict()
    moved = {name.split(".")[-2] for name in state if not torch.equal(state[name], plain[name])}
    assert {"attn_out", "ff_out"} < moved <= {"attn_out", "ff_out", "q_proj", "k_proj", "v_proj", "ff_proj", "up_proj"}


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
