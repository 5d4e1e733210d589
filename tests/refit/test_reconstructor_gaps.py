"""The refit where the dense model lacks attention or MLPs already, and of models with fewer blocks."""

from dataclasses import replace

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import ReconstructSettings
from structprune.models.adapter import Adapter
from structprune.refit.products import UNCHANGED
from structprune.refit.reconstruct import Reconstructor
from structprune.statistics.scan import Scan
from structprune.structured.plan import BlockPlan, Plan, identity_plan
from structprune.structured.surgery import apply_plan

HALF = tuple(range(0, 48, 2))


@pytest.fixture
def calibration(calibration) -> Calibration:
    """The shared one, its last window held out."""
    return replace(calibration, held_out=1)


def refit(model, plan: Plan, calibration: Calibration, target: str):
    """The cut model, its tensors before, and what its refit chose."""
    small = apply_plan(model, plan)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    settings = ReconstructSettings(target=target, producers=False)
    reconstructor = Reconstructor(Scan(Adapter(model), calibration), settings)
    return small, before, reconstructor.refit(small, plan.remaining)


@pytest.mark.parametrize("target", ["dense", "layer"])
@torch.no_grad()
def test_a_dense_model_with_gaps_is_walked_too(tiny_model, gaps, calibration, target):
    """The second block keeps half its MLP only, the third has nothing and goes, the last keeps half of its MLP."""
    model = tiny_model(**gaps())
    whole = identity_plan(Adapter(model)).blocks
    plan = Plan("llada", (whole[0], BlockPlan((), (), HALF), whole[2], replace(whole[3], channels=HALF)))
    small, before, fits = refit(model, plan, calibration, target)
    assert [(fit.block, fit.kind) for fit in fits] == [(0, "attention"), (1, "channels"), (3, "channels")]
    assert fits[0].damping == UNCHANGED and fits[0].error == pytest.approx(1)  # nothing is missing before it
    assert min(fit.error for fit in fits) < 0.99 and all(fit.error <= 1 for fit in fits)
    moved = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    changed = [plan.remaining.index(fit.block) for fit in fits if fit.damping != UNCHANGED]
    assert moved == {f"model.transformer.blocks.{index}.ff_out.weight" for index in changed}


@torch.no_grad()
def test_a_last_block_may_go(tiny_model, calibration):
    model = tiny_model("dream")
    whole = identity_plan(Adapter(model)).blocks
    plan = Plan("dream", (replace(whole[0], channels=HALF), whole[1], BlockPlan((), (), ())))
    small, _, fits = refit(model, plan, calibration, "dense")
    keys = [(0, "attention"), (0, "channels"), (1, "attention"), (1, "channels")]
    assert [(fit.block, fit.kind) for fit in fits] == keys and len(small.blocks) == 2


def test_a_model_with_fewer_blocks_needs_to_know_which(tiny_model, calibration):
    model = tiny_model()
    whole = identity_plan(Adapter(model)).blocks
    small = apply_plan(model, Plan("llada", (whole[0], BlockPlan((), (), ()), whole[2])))
    with pytest.raises(ValueError, match="shorter"):
        Reconstructor(Scan(Adapter(model), calibration), ReconstructSettings()).refit(small)
