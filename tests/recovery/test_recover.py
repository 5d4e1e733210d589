"""Whole recoveries of tiny models: what they gain, write, keep, refuse, and how they go on after a kill."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune.checkpoint.save import save_pruned
from structprune.config import Config, ExportSettings
from structprune.errors import UserError
from structprune.masking.masks import Masks
from structprune.models.loading import load_model
from structprune.recovery.folder import adopt, last_checkpoint, training_folder
from structprune.recovery.held_out import HeldOutStudy
from structprune.runs import training as module
from structprune.runs.checkpoints import mask_checkpoint
from structprune.runs.recover import recover


class Killed(BaseException):
    """A run that ends at once."""


def trained(method):
    """Keys of what is trained."""
    return {"train__method": method} | ({"train__rank": 4} if method == "lora" else {})


def weights(directory):
    return load_model(directory, device="cpu").state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("family, method", [("llada", "full"), ("llada", "lora"), ("dream", "lora")])
def test_a_recovery_gains_and_keeps_the_layout(pair, recover_config, tmp_path, family, method):
    dense, small = pair(family)
    out = tmp_path / "out"
    config = recover_config(**trained(method), train__learning_rate=5e-3)
    recovered = recover(str(small), str(dense), out, config)
    report = recovered.report
    assert report["kept"] == "trained" and report["after"]["kl"] < 0.97 * report["before"]["kl"]
    assert report["change"]["kl"]["mean"] == pytest.approx(report["after"]["kl"] - report["before"]["kl"])
    assert [each["tokens"] for each in report["history"]] == [16 * 8 * 4, 16 * 8 * 8, 16 * 8 * 12]
    assert report["after"]["kl"] == pytest.approx(min(each["kl"] for each in report["history"]), rel=1e-4)
    before, after = weights(small), weights(out)
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    projections = {
        f"{name}.weight"
        for name, module in load_model(small, device="cpu").named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks." in name + "blocks." * ("layers." in name)
    }
    assert moved == projections if method == "lora" else projections < moved
    assert (out / "config.json").read_bytes() == (small / "config.json").read_bytes()
    written = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [each["teacher"] for each in written["recoveries"]] == [f"{family}-tiny"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## Trained back" in card and "1,536 tokens of `text.txt`" in card and str(tmp_path) not in card
    assert f"\nin {report['seconds']:.0f} s.\n" in card
    assert not training_folder(out).exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_head_that_follows_the_embedding_still_does(pair, recover_config, tmp_path, method):
    dense, small = pair("a2d-qwen3")
    config = recover_config(**trained(method), train__learning_rate=1e-3)
    report = recover(str(small), str(dense), tmp_path / "out", config).report
    assert report["kept"] == "trained" and report["after"]["kl"] < report["before"]["kl"]
    before, after = (load_file(each / "model.safetensors") for each in (small, tmp_path / "out"))
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    name = "model.embed_tokens.weight"
    assert torch.equal(before[name], after[name]) == (method == "lora")
    assert weights(tmp_path / "out")["lm_head.weight"].equal(after[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_killed_training_goes_on_to_the_same_weights(pair, recover_config, tmp_path, monkeypatch, method, step):
    dense, small = pair()
    config = recover_config(**trained(method))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    report = recover(str(small), str(dense), whole, config).report
    steps = []

    class Mortal(module.Watch):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)
            if len(steps) == step:
                raise Killed
            super().on_step_end(args, state, control, **kwargs)

    monkeypatch.setattr(module, "Watch", Mortal)
    with pytest.raises(Killed):
        recover(str(small), str(dense), cut, config)
    assert not cut.exists() and training_folder(cut).exists()
    again = recover(str(small), str(dense), cut, config).report
    first = step - 1 - (step - 1) % 4  # checkpoints are written at steps 4, 8 and 12
    assert steps == [*range(1, step + 1), *range(first + 1, 13)]
    assert again["history"] == report["history"]
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_killed_while_it_writes_learns_nothing_again(pair, recover_config, tmp_path, monkeypatch, method):
    """Though its best weights are earlier ones than its last."""
    dense, small = pair()
    whole, cut, steps = tmp_path / "whole", tmp_path / "cut", []

    class Rising(module.Watch):
        def note(self, figures):
            return super().note(figures) | {"goal": len(self._shown)}  # the first measurement has the best

        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)
            super().on_step_end(args, state, control, **kwargs)

    monkeypatch.setattr(module, "Watch", Rising)
    config = recover_config(**trained(method))
    report = recover(str(small), str(dense), whole, config).report
    assert report["after"]["kl"] == pytest.approx(report["history"][0]["kl"], rel=1e-4) and steps == [*range(1, 13)]
    steps.clear()

    def end(*given, **named):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "save_masked", end)
        recover(str(small), str(dense), cut, config)
    again = recover(str(small), str(dense), cut, config).report
    assert steps == [*range(1, 13)] and again["history"] == report["history"] and again["kept"] == report["kept"]
    assert (again["learnt"]["resumed_at"], again["learnt"]["steps"]) == (12, 12)
    assert " s from step 12 on, after an interrupted run.\n" in (cut / "README.md").read_text(encoding="utf-8")
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_killed_training_goes_on_with_other_windows_in_a_pass(pair, recover_config, tmp_path, dying_at):
    """As many windows make a step, so that the weights are the same but for rounding."""
    dense, small = pair()
    whole = recover(str(small), str(dense), tmp_path / "whole", recover_config()).report

    with dying_at(6):
        recover(str(small), str(dense), tmp_path / "cut", recover_config())
    report = recover(str(small), str(dense), tmp_path / "cut", recover_config(train__pass_windows=2)).report
    assert (report["learnt"]["resumed_at"], report["learnt"]["steps"]) == (4, 12)
    for ours, theirs in zip(report["history"], whole["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_checkpoint_is_read_with_the_windows_of_this_run(tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"global_step": 4, "train_batch_size": 4}))
    adopt(tmp_path, 2)
    assert json.loads(path.read_text()) == {"global_step": 4, "train_batch_size": 2}


def test_an_unfinished_or_damaged_checkpoint_is_removed(tmp_path):
    for step in (4, 8, 12, 16, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).touch()
        save_file({"weight": torch.ones(4)}, folder / "model.safetensors")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global')
    (tmp_path / "checkpoint-16" / "optimizer.pt").unlink()
    weights = tmp_path / "checkpoint-20" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    (tmp_path / "checkpoint-24").mkdir()
    (tmp_path / "checkpoint-x").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]


@pytest.mark.slow
def test_what_is_no_gain_is_not_written(pair, recover_config, tmp_path):
    dense, small = pair()
    config = recover_config(train__learning_rate=10.0, train__clip=100.0, train__tokens=16 * 8 * 2)
    recovered = recover(str(small), str(dense), tmp_path / "out", config)
    assert recovered.report["kept"] == "input"
    ours, theirs = weights(tmp_path / "out"), weights(small)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "No gain" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "learnt.safetensors").exists()


@pytest.mark.slow
def test_lineage_grows(pair, recover_config, tmp_path):
    dense, small = pair()
    config = recover_config(train__tokens=16 * 8 * 2)
    first, second = tmp_path / "first", tmp_path / "second"
    recover(str(small), str(dense), first, config)
    recover(str(first), str(dense), second, config)
    report = json.loads((second / "report.json").read_text(encoding="utf-8"))
    assert [each["student"] for each in report["recoveries"]] == ["llada-small", "first"]
    assert (second / "README.md").read_text(encoding="utf-8").count("## Trained back") == 2


def test_another_training_in_the_folder_is_refused(pair, recover_config, whole_checkpoint, tmp_path):
    dense, small = pair()
    folder = training_folder(tmp_path / "out")
    whole_checkpoint(folder)
    for identity in ("{}", "half of a"):
        (folder / "identity.json").write_text(identity)
        with pytest.raises(UserError, match=r"holds another training: .* add --overwrite, or delete it"):
            recover(str(small), str(dense), tmp_path / "out", recover_config())
        assert (folder / "identity.json").read_text() == identity and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_measured_is_what_is_written(pair, recover_config, tmp_path, monkeypatch):
    """A half-precision checkpoint is trained in fp32; its figures are those of the rounded weights."""
    dense, _ = pair()
    model = load_model(dense, device="cpu")
    small = save_pruned(model, tmp_path / "half", ExportSettings(dtype="bfloat16"))
    measured = []
    original = HeldOutStudy.measure
    monkeypatch.setattr(HeldOutStudy, "measure", lambda self, model: measured.append(self) or original(self, model))
    config = recover_config(train__learning_rate=1e-3, loss__cross_entropy=1.0)
    recovered = recover(str(small), str(dense), tmp_path / "out", config)
    assert recovered.report["kept"] == "trained"
    again = original(measured[0], load_model(tmp_path / "out", torch.float32, "cpu")).means()
    assert again == pytest.approx(recovered.report["after"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_zeros_of_a_masked_checkpoint_stay(tiny_checkpoint, recover_config, tmp_path, text_path, method):
    dense, sparse = tiny_checkpoint(), tmp_path / "sparse"
    keys = {
        "method": "unstructured", "masking.ratio": 0.5, "calibration.source": str(text_path), "calibration.windows": 3,
        "calibration.held_out": 2, "calibration.length": 16, "model.device": "cpu",
    }  # fmt: skip
    mask_checkpoint(str(dense), sparse, Config.load(overrides=keys))
    config = recover_config(**trained(method), train__learning_rate=5e-3)
    report = recover(str(sparse), str(dense), tmp_path / "out", config).report
    assert report["kept"] == "trained"
    masks = Masks.load(tmp_path / "out" / "masks.safetensors")
    before, after = weights(sparse), weights(tmp_path / "out")
    for name in masks.packed:
        assert torch.equal(before[name] == 0, after[name] == 0) and not torch.equal(before[name], after[name])
