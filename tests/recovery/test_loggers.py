"""Loggers of transformers: what they get, and where their files end; stand-ins for libraries that are not installed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.integrations import integration_utils

from structprune.recovery.folder import is_training, training_folder
from structprune.runs.recover import recover


class Writer:
    """A SummaryWriter whose events can be read."""

    def __init__(self, log_dir):
        self._path = Path(log_dir) / "events.jsonl"
        self._path.parent.mkdir(parents=True)

    def add_scalar(self, name, value, step):
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, value, step]) + "\n")

    def add_text(self, *_):
        pass

    flush = close = add_text


class Tracker:
    """An EmissionsTracker: its file is in the folder from the start."""

    def __init__(self, output_dir):
        self._path = Path(output_dir) / "emissions.csv"

    def start(self):
        with self._path.open("a", encoding="utf-8") as file:
            file.write("a run\n")

    def stop(self):
        pass


@pytest.fixture
def stand_ins(monkeypatch):
    """TensorBoard and CodeCarbon, as far as transformers asks for them."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    for name in ("is_tensorboard_available", "is_codecarbon_available"):
        monkeypatch.setattr(integration_utils, name, lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "codecarbon", SimpleNamespace(EmissionsTracker=Tracker))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_tensorboard_gets_every_figure_and_its_files_stay(pair, recover_config, tmp_path, stand_ins, method):
    dense, small = pair()
    config = recover_config(train__method=method, train__report_to="tensorboard")
    report = recover(str(small), str(dense), tmp_path / "out", config).report
    [path] = (tmp_path / "out.runs").rglob("events.jsonl")
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for name in ("kl", "nelbo", "agreement", "accuracy", "goal"):
        ours = [(step, value) for tag, value, step in events if tag == f"eval/{name}"]
        assert ours == [(step, each[name]) for step, each in zip((4, 8, 12), report["history"], strict=True)]
    losses = [(step, value) for tag, value, step in events if tag == "train/loss"]
    assert [step for step, _ in losses] == [*range(1, 13)] and all(0 < value < 50 for _, value in losses)
    assert [step for tag, _, step in events if tag == "train/learning_rate"] == [*range(1, 13)]
    assert not training_folder(tmp_path / "out").exists()
    recover(str(small), str(dense), tmp_path / "out", config, overwrite=True)
    assert path.exists() and len([*(tmp_path / "out.runs.new").rglob("events.jsonl")]) == 1


@pytest.mark.slow
def test_a_killed_training_goes_on_beside_a_file_of_its_logger(pair, recover_config, tmp_path, stand_ins, dying_at):
    dense, small = pair()
    out, config = tmp_path / "out", recover_config(train__report_to="codecarbon")

    with dying_at(6):
        recover(str(small), str(dense), out, config)
    folder = training_folder(out)
    assert (folder / "emissions.csv").exists() and is_training(folder)
    assert recover(str(small), str(dense), out, config).report["learnt"]["resumed_at"] == 4
    assert (tmp_path / "out.runs" / "emissions.csv").read_text(encoding="utf-8") == "a run\na run\n"
    assert not folder.exists()
