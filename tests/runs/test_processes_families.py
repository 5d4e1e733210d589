"""Prunings of block diffusion models and of mixtures of experts that two processes share, against one."""

import pytest

from tests.runs.processes import ONE, both_ways, check_alike
from tests.runs.test_processes import CASES

SINKS = {"structured.arm": "masked+sink", "structured.score": "wanda"}
PRUNINGS = {
    "llada-moe": {
        "obs": ONE, "whole experts": ONE | SINKS | {"structured.experts": 1, "structured.ratio": 0.4},
        "sparsegpt": CASES["sparsegpt"], "sink-wanda": CASES["sink-wanda"],
    },
    "llada2": {
        "groups and shared": ONE | {"structured.experts": 2, "structured.shared": 4}, "sparsegpt": CASES["sparsegpt"],
    },
    "nemotron-labs": {"both uses": ONE | {"calibration.causal": 0.5}, "wanda": CASES["sink-wanda"]},
    "sdar": {"obs": ONE, "wanda on a sink arm": ONE | SINKS, "sink-wanda": CASES["sink-wanda"]},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", PRUNINGS)
def test_two_processes_prune_as_one(family, tmp_path, tiny_checkpoint):
    cases = PRUNINGS[family]
    runs = both_ways(cases, tmp_path, str(tiny_checkpoint(family)))
    for name, keys in cases.items():
        check_alike(runs, name, keys)
