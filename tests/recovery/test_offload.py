"""Trainings whose models stay in host memory, with the CPU for an accelerator: layers are copied to it."""

from collections import Counter

import pytest
import torch

from structprune.models import placement
from structprune.models.loading import load_model
from structprune.models.placement import streamed
from structprune.recovery import blocks
from structprune.runs import recovery_plan
from structprune.runs import training as module
from structprune.runs.recover import recover

STEP = 16 * 8  # tokens of an optimiser step
FIRST = {"blocks__tokens": 3 * STEP, "blocks__learning_rate": 1e-3}
ONLY = FIRST | {  # without a second stage; the others are defaults
    "train__tokens": 0, "train__method": "lora", "train__learning_rate": 5e-4, "train__evaluations": 10,
}  # fmt: skip


@pytest.fixture
def offloaded(monkeypatch):
    """`offloaded()` lets all models of a recovery that compute without gradients be streamed from then on; returns the
    copies made of each weight's shape."""

    def begin() -> Counter:
        copies: Counter = Counter()
        copy = placement._Weights._copy

        def counted(self, weight, dtype):
            copies[tuple(weight.shape)] += 1
            return copy(self, weight, dtype)

        monkeypatch.setattr(placement._Weights, "_copy", counted)
        monkeypatch.setattr(recovery_plan, "check_device", lambda *_, **__: None)  # refuses both on a CPU
        for home in (module, blocks):
            monkeypatch.setattr(home, "streamed", lambda model, _: streamed(model, torch.device("cpu")))
        return copies

    return begin


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys, passes",
    [
        ({"teacher__offload": True}, 6 * 2),
        ({"teacher__offload": True, "loss__streams": 1.0, "train__method": "lora"}, 6 * 2),
        ({"blocks__offload": True, **FIRST}, 6 * 2),
        ({"blocks__offload": True, **ONLY}, 0),
        ({"teacher__offload": True, "blocks__offload": True, **FIRST}, 6 * 2),
    ],
)
def test_models_in_host_memory_teach_the_same(pair, recover_config, tmp_path, offloaded, keys, passes):
    """`passes`: of the dense model beside the student's, two in each of six steps."""
    dense, small = pair()
    keys = {"train__tokens": 6 * STEP} | keys
    here = recover_config(**{key: value for key, value in keys.items() if "offload" not in key})
    there = recover_config(**keys)
    plain = recover(str(small), str(dense), tmp_path / "plain", here).report
    copies = offloaded()
    report = recover(str(small), str(dense), tmp_path / "offloaded", there).report
    for name in ("teacher_figures", "before", "after", "change", "history", "kept"):
        assert report[name] == plain[name], name
    stages = [each["blocks"] and each["blocks"]["layers"] for each in (report, plain)]
    assert stages[0] == stages[1] and bool(stages[0]) == ("blocks__tokens" in keys)
    ours, theirs = (load_model(tmp_path / name, device="cpu").state_dict() for name in ("offloaded", "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    copied = copies[(48, 32)]  # the dense model's gates and ups: six in each of its passes
    assert copied % 6 == 0 and copied // 6 > passes
