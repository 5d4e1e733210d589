"""The first stage of a recovery together with other choices: an 8-bit teacher, a cache, a run that prunes first."""

import json

import pytest
import torch

from structprune.cli.main import main
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.models.int8 import Int8Linear, to_int8
from structprune.models.loading import load_model
from structprune.progress import untracked
from structprune.recovery.blocks import BlockStage, block_rows, load_blocks
from structprune.recovery.folder import block_path, training_folder
from structprune.recovery.text import RecoveryText
from structprune.runs import gradual as module
from structprune.runs.gradual import ScheduleRun, prune_and_recover
from structprune.runs.recover import checked, recover
from structprune.runs.stages import left_behind, pruned_model

STEP = 16 * 8  # tokens of an optimiser step
FIRST = {"blocks__tokens": 4 * STEP, "blocks__learning_rate": 1e-3}


class Killed(BaseException):
    """A run that ends at once."""


def weights(directory):
    return load_model(directory, device="cpu").state_dict()


def learn_blocks(student, dense, config, folder):
    """Figures of every block, against a dense model in memory."""
    text = RecoveryText(*torch.randint(0, 2000, (2, 6, 16), generator=torch.Generator().manual_seed(4)))
    rows = block_rows(text, student, config)
    BlockStage((student, dense), (0, 1, 2), rows, config, torch.device("cpu")).complete(folder, None, untracked)
    return load_blocks(folder, Adapter(student))


def test_blocks_learn_the_stream_of_an_int8_model(tiny_model, recover_config, tmp_path):
    """It is that of the rounded weights, not of the dense ones."""
    rounded, same = to_int8(tiny_model(), torch.float32), tiny_model()
    for name, layer in rounded.named_modules():
        if isinstance(layer, Int8Linear):
            same.get_submodule(name).weight.data = layer.weight.float() * layer.scale[:, None]
    models = {"int8": rounded, "its values": same, "dense": tiny_model()}
    config = recover_config(**FIRST)
    results = {
        name: learn_blocks(tiny_model(mlp_hidden_size=24), dense, config, tmp_path / name)
        for name, dense in models.items()
    }
    errors = {name: [each[side] for each in own for side in ("before", "after")] for name, own in results.items()}
    assert errors["int8"] == pytest.approx(errors["its values"], rel=1e-5)
    assert errors["int8"] != pytest.approx(errors["dense"], rel=1e-5)
    assert all(each["after"] < each["before"] for each in results["int8"])


@pytest.mark.slow
def test_both_stages_learn_from_an_int8_teacher(pair, recover_config, tmp_path):
    dense, small = pair()
    config = recover_config(teacher__int8=True, train__tokens=4 * STEP, **FIRST)
    report = recover(str(small), str(dense), tmp_path / "out", config).report
    assert report["config"]["teacher"]["int8"] and report["kept"] == "trained"
    assert report["after"]["kl"] < report["blocks"]["held_out"]["kl"] < report["before"]["kl"]


@pytest.mark.slow
def test_a_cache_holds_the_windows_behind_those_of_the_first_stage(pair, recover_config, tmp_path):
    """With all tokens kept, the training is that beside a live teacher, up to rounding."""
    dense, small = pair()
    source = tmp_path / "short.txt"  # so that all trainings have the same windows
    source.write_text("One sentence of some length, for windows of tokens. " * 20, encoding="utf-8")
    keys = {"train__tokens": 4 * STEP, "data__held_out": 4, "data__source": str(source)}
    cached = {"teacher__cache": str(tmp_path / "cache"), "teacher__top": 2048}
    live = recover(str(small), str(dense), tmp_path / "live", recover_config(**keys, **FIRST)).report
    report = recover(str(small), str(dense), tmp_path / "cached", recover_config(**keys, **cached, **FIRST)).report
    assert report["blocks"]["layers"] == live["blocks"]["layers"]
    assert report["after"]["kl"] == pytest.approx(live["after"]["kl"], rel=1e-3)
    assert json.loads((tmp_path / "cache" / "identity.json").read_text(encoding="utf-8"))["first"] == 4 * 8
    with pytest.raises(UserError, match="holds predictions of another teacher, text or setting"):
        recover(str(small), str(dense), tmp_path / "other", recover_config(**keys, **cached))


def test_breadth_counts_the_windows_of_both_stages(pair, recover_config, tmp_path):
    dense, small = pair()
    source = tmp_path / "short.txt"
    source.write_text("One sentence of some length, for windows of tokens. " * 20, encoding="utf-8")
    keys = {"train__tokens": 40 * STEP, "data__held_out": 4, "data__source": str(source)}
    plain, both = (
        checked(str(small), str(dense), tmp_path / "out", recover_config(**keys, **more)) for more in ({}, FIRST)
    )
    assert both.breadth["epochs"] == pytest.approx(plain.breadth["epochs"] * 44 / 40)
    assert plain.breadth["warning"].endswith("or lower train.tokens")
    assert both.breadth["warning"].endswith("or lower blocks.tokens and train.tokens")


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 2 * STEP])
def test_a_run_that_prunes_first_goes_on_at_a_killed_block(
    tiny_checkpoint, schedule, recover_config, tmp_path, monkeypatch, tokens
):
    dense, out = str(tiny_checkpoint()), tmp_path / "out"
    alone = {"train__method": "lora", "train__learning_rate": 5e-4, "train__evaluations": 10} if tokens == 0 else {}
    asked = schedule(0.5, recovery=FIRST | {"train__tokens": tokens} | alone)
    [whole] = prune_and_recover(dense, tmp_path / "whole", asked)
    learn = BlockStage._learn

    def mortal(self, view, *args):
        if view.index == 1:
            raise Killed
        return learn(self, view, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(BlockStage, "_learn", mortal)
        prune_and_recover(dense, out, asked)
    assert block_path(training_folder(out), 0).exists()
    assert left_behind(out) == [pruned_model(out).parent, training_folder(out)]
    with pytest.raises(UserError, match="holds another training"):
        prune_and_recover(dense, out, schedule(0.5, recovery=FIRST | {"train__tokens": 3 * STEP}))
    monkeypatch.setattr(module, "prune_at_ratios", None)
    [step] = prune_and_recover(dense, out, asked)
    ours, theirs = (each.report["recoveries"][0] for each in (step, whole))
    assert ours["tokens"] == 4 * STEP + tokens and ours["kept"] == "trained"
    assert ours["blocks"]["layers"] == theirs["blocks"]["layers"] and ours["after"] == theirs["after"]
    ours, theirs = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not training_folder(out).exists() and not pruned_model(out).exists()


def test_a_dry_run_of_pruning_and_training_predicts_both_stages(tiny_checkpoint, text_path, tmp_path, capsys):
    keys = ["data.length=16", "train.batch=8", "data.held_out=4", "blocks.tokens=640", "train.tokens=1280"]
    command = ["prune", str(tiny_checkpoint()), "--out", str(tmp_path / "out"), "--ratio", "0.5", "--device", "cpu"]
    command += ["--calibration", str(text_path), "--recover", "--dry-run", *(f"--recover-set={key}" for key in keys)]
    command += ["--set=calibration.windows=3", "--set=calibration.held_out=2", "--set=calibration.length=16"]
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "predicted memory of the training, block by block" in shown and "residual streams, on the host" in shown
    assert f"{tmp_path / 'out'}: 5 steps over 640 tokens for every block, block by block" in shown
    assert f"{tmp_path / 'out'}: 10 steps over 1,280 tokens; with those," in shown


def test_several_ratios_may_each_have_a_first_stage(tiny_checkpoint, schedule, tmp_path):
    run = ScheduleRun(str(tiny_checkpoint()), tmp_path / "out", schedule(0.3, 0.5, recovery=FIRST))
    plans = [training for _, _, training in run.plan()]
    assert [plan["blocks"]["tokens"] for plan in plans] == [4 * STEP] * 2
    sizes = [plan["blocks"]["memory"]["a block, gradients and optimiser"] for plan in plans]
    assert sizes[1] < sizes[0]
