"""Masks of models whose blocks lack attention or MLPs: those of a whole model that computes the same."""

from dataclasses import replace

import pytest
import torch

from structprune.config import Config
from structprune.models.adapter import Adapter
from structprune.runs.mask import mask
from tests.tiny_values import GRAPHS

RUNS = {
    "magnitude": {"masking.score": "magnitude", "reconstruct.enabled": False},
    "wanda, one-shot": {"masking.score": "wanda", "masking.order": "one-shot"},
    "wanda, one-shot, no refit": {"masking.score": "wanda", "masking.order": "one-shot", "reconstruct.enabled": False},
    "wanda, sequential": {"masking.score": "wanda", "masking.order": "sequential"},
    "wanda, layer targets": {"masking.score": "wanda", "masking.order": "sequential", "reconstruct.target": "layer"},
    "ria, summed": {"masking.score": "ria", "masking.norms": "summed", "masking.order": "one-shot"},
    "sparsegpt": {"masking.score": "sparsegpt"},
    "sparsegpt, one-shot": {"masking.score": "sparsegpt", "masking.order": "one-shot"},
    "2:4": {"method": "nm", "masking.score": "wanda", "masking.nm": "2:4"},
    "clean": {"masking.score": "wanda", "masking.arm": "clean", "masking.order": "sequential"},
}


@pytest.fixture
def run(calibration, monkeypatch):
    """`run(model, changes)` -> the masked result, its refit kept."""
    monkeypatch.setattr("structprune.runs.mask.MaskRun._check", lambda *_: None)
    monkeypatch.setattr("structprune.runs.mask.run_report", lambda *_: {})

    def make(model, changes):
        values = {"method": "unstructured", "masking.ratio": 0.5, "calibration.held_out": 1} | changes
        if values["method"] == "nm":
            del values["masking.ratio"]
        return mask(model, Config.load(overrides=values), replace(calibration, held_out=1))

    return make


@pytest.mark.parametrize("family", [*GRAPHS, "a2d-qwen3-blocks"])
@pytest.mark.parametrize("name", RUNS)
def test_every_score_and_refit(gap_pair, run, family, name):
    gapped, whole = gap_pair(family)
    ours, theirs = (run(model, RUNS[name]) for model in (gapped, whole))
    names = [block.names[role] for block in Adapter(gapped).blocks for role in block.names]
    count, every = {"llada-moe": (44, 88), "llada2": (62, 100)}.get(family, (14, 28))  # of experts, those of each
    assert set(ours.masks.packed) == {f"{each}.weight" for each in names}
    assert (len(names), len(theirs.masks.packed)) == (count, every)
    for weight in ours.masks.packed:
        assert torch.equal(ours.masks.kept(weight), theirs.masks.kept(weight)), weight
        assert torch.allclose(ours.model.get_parameter(weight), theirs.model.get_parameter(weight), atol=1e-3), weight
    changed = any(fit["damping"] is not None for fit in ours.report["refit"])
    assert changed == RUNS[name].get("reconstruct.enabled", True)
    assert len(ours.report["refit"]) == (count if changed else 0)
