"""A training that does not fit the device's memory."""

import re

import pytest
import torch

from structprune.errors import UserError
from structprune.recovery.blocks import BlockStage
from structprune.recovery.folder import training_folder
from structprune.recovery.settings import RecoverConfig
from structprune.recovery.teacher import LiveTeacher
from structprune.runs import training as module
from structprune.runs.recover import recover


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.slow
def test_a_full_memory_is_one_line_and_fewer_windows_go_on(pair, recover_config, tmp_path, monkeypatch):
    dense, small = pair()
    predict, calls = LiveTeacher.predict, []

    def fills(self, *given):
        calls.append(1)
        return predict(self, *given) if len(calls) <= 2 * 5 else full()

    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(LiveTeacher, "predict", fills)
        recover(str(small), str(dense), tmp_path / "out", recover_config())
    line = str(caught.value)
    assert line == f"the training does not fit the memory of cpu: {module.REMEDY}" and "\n" not in line
    assert (training_folder(tmp_path / "out") / "checkpoint-4").exists() and not (tmp_path / "out").exists()
    again = recover(str(small), str(dense), tmp_path / "out", recover_config(train__pass_windows=2)).report
    assert (again["learnt"]["resumed_at"], again["learnt"]["steps"]) == (4, 12)


@pytest.mark.slow
def test_a_block_that_fills_the_memory_is_one_line(pair, recover_config, tmp_path, monkeypatch):
    dense, small = pair()
    monkeypatch.setattr(BlockStage, "_learn", full)
    with pytest.raises(UserError) as caught:
        recover(str(small), str(dense), tmp_path / "out", recover_config(blocks__tokens=16 * 8 * 2))
    assert str(caught.value) == f"a block does not fit the memory of cpu: {module.BLOCK_REMEDY}"
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("remedy", [module.REMEDY, module.BLOCK_REMEDY])
def test_every_key_of_a_remedy_exists(remedy):
    keys = re.findall(r"(data|train|teacher|blocks)\.(\w+)", remedy)
    assert len(keys) >= 4
    assert all(name in type(getattr(RecoverConfig(), section)).model_fields for section, name in keys)
