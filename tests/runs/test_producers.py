"""Whole runs that refit q, k, v, gate and up too."""

from dataclasses import replace

import pytest
import torch

from structprune import Config, load_model, prune
from structprune.models.adapter import Adapter
from structprune.refit.reconstruct import Reconstructor
from structprune.runs.pruner import Pruner

KEYS = {
    "calibration.windows": 12, "calibration.held_out": 4, "calibration.length": 32, "calibration.interval": 25,
    "structured.score": "magnitude", "structured.split": "equal", "reconstruct.producers": True,
}  # fmt: skip
ROLES = {"attention": ("query", "key", "value"), "channels": ("gate", "up")}
CONSUMERS = ("attention_output", "down")


@pytest.fixture
def config(text_path):
    """`config(**changes)` -> such a run at ratio 0.5, on 12 windows of 32 tokens."""
    return lambda **changes: Config.load(overrides=KEYS | {"calibration.source": str(text_path)} | changes)


def check_as_if(monkeypatch, gain: float) -> None:
    """Held-out losses of the dense model, the plain removal, and the refit, which gains so much."""
    made, losses = Pruner.nelbo, iter([3.0, 4.0, 4.0 - gain])

    def nelbo(self, model):
        measured = made(self, model)
        return replace(measured, nelbo=torch.full_like(measured.nelbo, next(losses)))

    monkeypatch.setattr(Pruner, "nelbo", nelbo)


@pytest.mark.parametrize("gain", [0.5, -0.5])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_check_keeps_or_drops_all_that_a_refit_changed(tiny_checkpoint, config, monkeypatch, family, gain):
    check_as_if(monkeypatch, gain)
    model = load_model(tiny_checkpoint(family))
    pruner = Pruner(model, config())
    plan = pruner.plan(0.5)[0]
    result = pruner.prune(plan=plan)
    plain, refitted = pruner._cut(plan).state_dict(), pruner._refit(plan)[0].state_dict()
    expected = refitted if gain > 0 else plain
    ours = result.model.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())
    names = [block.names for block in Adapter(result.model).blocks]
    for role in (*ROLES["attention"], *ROLES["channels"], *CONSUMERS):
        assert any(not torch.equal(plain[f"{each[role]}.weight"], refitted[f"{each[role]}.weight"]) for each in names)
    assert result.report["held_out_nelbo"]["kept"] == ("refit" if gain > 0 else "plain removal")


def test_the_report_lists_producers_before_their_consumer(tiny_checkpoint, config):
    fits = prune(load_model(tiny_checkpoint("dream")), config()).report["refit"]
    halves = [(block, kind) for block in range(3) for kind in ("attention", "channels")]
    expected = [
        (block, name) for block, kind in halves for name in (*ROLES[kind], kind) if (block, name) not in
        {(0, role) for role in ROLES["attention"]}  # of which the inputs are those of the dense model
    ]  # fmt: skip
    assert [(fit["block"], fit["kind"]) for fit in fits] == expected
    assert all(fit["error"] == 1 if fit["damping"] is None else 0 < fit["error"] < 1 for fit in fits)


@pytest.mark.parametrize("changes", [{}, {"reconstruct.target": "mixed"}, {"memory.budget_gb": 1e-6}])
def test_streamed_weights_give_the_same(tiny_checkpoint, config, cpu_accelerator, changes):
    directory = tiny_checkpoint("dream")
    results = [prune(load_model(directory), config(**changes, **{"memory.offload": each})) for each in (True, False)]
    assert results[0].report["refit"] == results[1].report["refit"]
    ours, theirs = (result.model.state_dict() for result in results)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_bf16_weights_are_refitted_to_nearly_the_same(tiny_checkpoint, config):
    """By the held-out error of every linear, of which some gain much."""
    errors = []
    for dtype in ("float32", "bfloat16"):
        model = load_model(tiny_checkpoint("dream", name=dtype), dtype=getattr(torch, dtype))
        report = prune(model, config(**{"model.dtype": dtype})).report
        errors.append([fit["error"] for fit in report["refit"]])
    assert min(errors[0]) < 0.9
    assert errors[1] == pytest.approx(errors[0], abs=0.1)


def test_candidates_of_the_split_have_their_consumers_refitted_alone(tiny_checkpoint, config, monkeypatch):
    """All of what is asked for is refitted once, in the plan that was chosen."""
    calls, original = [], Reconstructor.refit

    def refit(self, small, remaining, producers, _journal, _experts):
        calls.append(producers)
        return original(self, small, remaining, producers)

    monkeypatch.setattr(Reconstructor, "refit", refit)
    prune(load_model(tiny_checkpoint()), config(**{"structured.split": "measured", "structured.split_windows": 4}))
    assert len(calls) > 2 and calls == [False] * (len(calls) - 1) + [True]
