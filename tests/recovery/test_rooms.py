"""What a training puts on disks while it runs: predicted, refused before it begins, and not asked for again."""

import shutil
from types import SimpleNamespace

import pytest

from structprune.errors import UserError
from structprune.files import bytes_in
from structprune.recovery.folder import training_folder
from structprune.runs import training
from structprune.runs.gradual import ScheduleRun
from structprune.runs.recover import checked, recover

SIZES = {"full": {"train__method": "full"}, "lora": {"train__method": "lora", "train__rank": 64}}


def free(monkeypatch, size):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))


@pytest.mark.slow
@pytest.mark.parametrize("method", SIZES)
def test_the_folder_takes_what_is_predicted(pair, recover_config, tmp_path, dying_at, monkeypatch, method):
    dense, small = pair()
    out, config = tmp_path / "out", recover_config(blocks__tokens=16 * 8 * 2, **SIZES[method])
    plan = checked(str(small), str(dense), out, config).plan()
    with dying_at(10):  # checkpoints of steps 4 and 8 are there
        recover(str(small), str(dense), out, config)
    folder = training_folder(out)
    blocks = bytes_in(folder / "blocks")
    checkpoints = [bytes_in(folder / "checkpoint-8", name) for name in ("*.safetensors", "optimizer.pt")]
    assert plan["folder"] == pytest.approx(3 * sum(checkpoints) + blocks, rel=0.1)
    student = sum(path.stat().st_size for path in small.glob("*.safetensors"))
    left = plan["folder"] - bytes_in(folder)
    assert 0 < left < plan["folder"] / 2
    recovery = checked(str(small), str(dense), out, config)
    free(monkeypatch, student + left)
    recovery.check_room(out)  # what is there is not asked for again
    free(monkeypatch, left)
    with pytest.raises(UserError, match="checkpoints of the training in"):
        recovery.check_room(out)


def test_a_disk_that_is_too_small_is_refused_before_weights_are_read(pair, recover_config, tmp_path, monkeypatch):
    dense, small = pair()
    config = recover_config(teacher__cache=str(tmp_path / "cache"))
    recovery = checked(str(small), str(dense), tmp_path / "out", config)
    plan, stored = recovery.plan(), recovery._ghosts[0].stored_bytes
    whole = stored + plan["folder"] + plan["cache"]
    free(monkeypatch, whole)
    recovery.check_room(tmp_path / "out")
    free(monkeypatch, whole - 1)
    checked(str(small), str(dense), tmp_path / "out", config)  # as a dry run does, which says how much it would be
    monkeypatch.setattr(training, "load_model", None)
    with pytest.raises(UserError) as caught:
        recover(str(small), str(dense), tmp_path / "out", config)
    line = str(caught.value)
    assert f"checkpoints of the training in '{tmp_path / 'out.training'}' ({plan['folder'] / 1e9:.2f} GB)" in line
    assert f"the teacher's predictions in '{tmp_path / 'cache'}'" in line and "set train.method = lora" in line
    assert not list(tmp_path.glob("out*")) and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("gradual", [False, True])
def test_a_schedule_asks_for_the_folder_of_a_training(pair, schedule, tmp_path, monkeypatch, gradual):
    dense, _ = pair()
    given = schedule(0.3, 0.5, steps=8, gradual=gradual)
    first = ScheduleRun(str(dense), tmp_path / "out", given).plan()[0][2]
    output = 3 * sum(path.stat().st_size for path in dense.glob("*.safetensors"))  # two, and one that is pruned
    free(monkeypatch, output + first["folder"])
    ScheduleRun(str(dense), tmp_path / "out", given)
    free(monkeypatch, output)
    with pytest.raises(UserError, match="checkpoints of the training in"):
        ScheduleRun(str(dense), tmp_path / "out", given)
    assert not list(tmp_path.glob("out*"))
