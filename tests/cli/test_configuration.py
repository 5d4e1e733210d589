"""Options that name a key of the configuration, and lengths that follow the model where none is named."""

import pytest

from structprune.cli.configuration import read_config
from structprune.cli.main import main
from structprune.config import Config
from structprune.config.sections import within_positions
from structprune.recovery.settings import RecoverConfig
from structprune.runs.resolve import resolve_masking, resolve_structured


@pytest.mark.parametrize("method, section, other", [
    (None, "structured", "masking"), ("unstructured", "masking", "structured"), ("nm", "masking", "structured"),
])  # fmt: skip
def test_score_and_arm_are_those_of_the_method(method, section, other):
    options = {"method": method, "score": "wanda", "arm": "clean", "reconstruct.enabled": False}
    config = read_config(None, None, ["structured.arm=masked"] if method is None else None, None, options)
    ours, theirs = getattr(config, section), getattr(config, other)
    assert (ours.score, ours.arm) == ("wanda", "clean") and theirs == type(theirs)()
    assert config.reconstruct.enabled is False


def test_options_reach_the_run(tiny_checkpoint, text_path, tmp_path):
    import json

    command = ["prune", str(tiny_checkpoint()), "--out", str(tmp_path / "out"), "--calibration", str(text_path)]
    command += ["--score", "magnitude", "--no-refit", "--dtype", "bfloat16", "--device", "cpu"]
    few = ("calibration.windows=4", "calibration.held_out=2", "structured.split=equal", "calibration.steps=2")
    assert main([*command, *(f"--set={text}" for text in few), "--set=calibration.interval=1"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["config"]["structured"]["score"] == "magnitude" and report["dtype"] == "bfloat16"
    assert report["config"]["reconstruct"]["enabled"] is False and report["held_out_nelbo"]["refit"] is None
    assert report["config"]["calibration"]["length"] == report["calibration"]["length"] == 64  # the model's positions


@pytest.mark.parametrize("option", [("--score", "wanda"), ("--arm", "clean")])
def test_a_plan_leaves_nothing_to_score(tiny_checkpoint, tmp_path, capsys, option):
    command = ["prune", str(tiny_checkpoint()), "--out", str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json")]
    assert main([*command, *option]) == 2
    assert "--plan already says what is removed: leave out --ratio, --score, --arm" in capsys.readouterr().err


def test_windows_are_no_longer_than_the_model_takes(tiny_model):
    model, masks = tiny_model(), {"method": "unstructured"}
    assert resolve_structured(Config(), model).calibration.length == 64
    assert resolve_masking(Config.load(overrides=masks), model).calibration.length == 64
    long = tiny_model(max_sequence_length=4096)
    assert resolve_structured(Config(), long).calibration.length == 2048
    named = Config.load(overrides={"calibration.length": 2048})
    assert resolve_structured(named, model).calibration.length == 2048  # which is refused later, by its name


def test_windows_to_learn_are_no_longer_either():
    data = RecoverConfig().data
    assert (within_positions(data, 256).length, within_positions(data, 4096).length) == (256, 512)
    named = RecoverConfig.load(overrides={"data.length": 512}).data
    assert within_positions(named, 256).length == 512
