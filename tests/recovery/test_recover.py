"""Whole recoveries of tiny models: what they gain, write, keep, refuse, and how they go on after a kill."""

import json

import pytest
import torch

from structprune.config import Config
from structprune.errors import UserError
from structprune.masking.masks import Masks
from structprune.models.loading import load_model
from structprune.recovery.folder import last_checkpoint, open_folder, training_folder
from structprune.runs import training as module
from structprune.runs.checkpoints import mask_checkpoint
from structprune.runs.recover import recover


class Killed(BaseException):
    """A run that ends at once."""


def weights(directory):
    return load_model(directory, device="cpu").state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("family, method", [("llada", "full"), ("dream", "lora")])
def test_a_recovery_gains_and_keeps_the_layout(pair, recover_config, tmp_path, family, method):
    dense, small = pair(family)
    out = tmp_path / "out"
    config = recover_config(train__method=method, train__rank=4, train__learning_rate=5e-3)
    recovered = recover(str(small), str(dense), out, config)
    report = recovered.report
    assert report["kept"] == "trained" and report["after"]["kl"] < 0.97 * report["before"]["kl"]
    assert report["change"]["kl"]["mean"] == pytest.approx(report["after"]["kl"] - report["before"]["kl"])
    assert [each["tokens"] for each in report["history"]] == [16 * 8 * 4, 16 * 8 * 8, 16 * 8 * 12]
    assert report["after"]["kl"] == pytest.approx(min(each["kl"] for each in report["history"]), rel=1e-4)
    before, after = weights(small), weights(out)
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    projections = {name for name in before if name.endswith("proj.weight")}
    assert moved == projections if method == "lora" else projections < moved
    assert (out / "config.json").read_bytes() == (small / "config.json").read_bytes()
    written = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [each["teacher"] for each in written["recoveries"]] == [f"{family}-tiny"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## Trained back" in card and "1,536 tokens of `text.txt`" in card and str(tmp_path) not in card
    assert not training_folder(out).exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_killed_training_goes_on_to_the_same_weights(pair, recover_config, tmp_path, monkeypatch, method, step):
    dense, small = pair()
    config = recover_config(train__method=method, train__rank=4)
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


def test_an_unfinished_checkpoint_is_removed(tmp_path):
    for step, state in ((4, '{"global_step": 4}'), (8, '{"global_step": 8}'), (12, '{"global')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-16").mkdir()
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


def test_another_training_in_the_folder_is_refused(pair, recover_config, tmp_path):
    dense, small = pair()
    folder = training_folder(tmp_path / "out")
    folder.mkdir()
    (folder / "identity.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds another training: .* add --overwrite, or delete it"):
        recover(str(small), str(dense), tmp_path / "out", recover_config())
    assert (folder / "identity.json").read_text() == "{}" and not (tmp_path / "out").exists()


def test_overwrite_forgets_another_training_and_nothing_else(tmp_path):
    folder = training_folder(tmp_path / "out")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"is something else: move it, or choose another --out"):
            open_folder(tmp_path / "out", {"of": "this"}, overwrite)
    (folder / "thesis.txt").unlink()
    assert open_folder(tmp_path / "out", {"of": "that"}, False) == folder
    (folder / "checkpoint-4").mkdir()
    open_folder(tmp_path / "out", {"of": "that"}, True)
    assert (folder / "checkpoint-4").exists()  # the same training goes on
    open_folder(tmp_path / "out", {"of": "this"}, True)
    assert [path.name for path in folder.iterdir()] == ["identity.json"]


def test_models_that_do_not_belong_together_are_refused(pair, tiny_checkpoint, recover_config, tmp_path):
    _, small = pair()
    other, wide = tiny_checkpoint("dream"), tiny_checkpoint("llada", name="wide", embedding_size=2100)
    for teacher, reason in ((other, "family llada and the teacher 'dream-tiny' dream"), (wide, "vocabulary 2048 and")):
        with pytest.raises(UserError, match=reason):
            recover(str(small), str(teacher), tmp_path / "out", recover_config())
    assert not list(tmp_path.glob("out*"))


def test_a_batch_that_cannot_be_dealt_is_refused(pair, recover_config, tmp_path):
    dense, small = pair()
    with pytest.raises(UserError, match=r"train.batch = 10 windows .* train.pass_windows = 4: make it a multiple of 4"):
        recover(str(small), str(dense), tmp_path / "out", recover_config(train__batch=10))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_cache_of_the_teacher_is_written_once_and_replayed(pair, recover_config, tmp_path, monkeypatch):
    """With all tokens kept, the training is that beside a live teacher, up to rounding."""
    dense, small = pair()
    config, cache = recover_config(teacher__top=2048, train__tokens=16 * 8 * 4), tmp_path / "cache"
    live = recover(str(small), str(dense), tmp_path / "live", recover_config(train__tokens=16 * 8 * 4))
    cached = recover(str(small), str(dense), tmp_path / "cached", config, teacher_cache=cache)
    assert cached.report["after"]["kl"] == pytest.approx(live.report["after"]["kl"], rel=1e-3)
    files = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert set(files) == {"identity.json", "windows-00000000.npz"}
    monkeypatch.setattr("structprune.recovery.cache._kept", lambda *_: pytest.fail("predicted again"))
    again = recover(str(small), str(dense), tmp_path / "again", config, teacher_cache=cache)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    assert again.report["after"] == cached.report["after"]


def test_a_cache_of_something_else_is_refused(pair, recover_config, tmp_path):
    dense, small = pair()
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is no cache of predictions: choose an empty place for --teacher-cache"):
        recover(str(small), str(dense), tmp_path / "out", recover_config(), teacher_cache=cache)
    (cache / "notes.txt").rename(tmp_path / "notes.txt")
    (cache / "identity.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds predictions of another teacher, text or setting"):
        recover(str(small), str(dense), tmp_path / "out", recover_config(), teacher_cache=cache)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "keys, cache, reason",
    [
        ({"loss__kl": 0}, False, "nothing would be learnt"),
        ({"loss__kl": 0, "loss__cross_entropy": 1}, True, "has no effect with loss.kl = 0"),
        ({"loss__temperature": 2}, True, "keeps predictions at temperature 1"),
        ({"teacher__top": 8}, False, "teacher.top = 8 has no effect without --teacher-cache"),
        ({"teacher__offload": True}, False, "teacher.offload = true has no effect on a CPU"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(pair, recover_config, tmp_path, keys, cache, reason):
    dense, small = pair()
    place = tmp_path / "cache" if cache else None
    with pytest.raises(UserError, match=reason):
        recover(str(small), str(dense), tmp_path / "out", recover_config(**keys), teacher_cache=place)
    assert not list(tmp_path.glob("out*")) and not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_zeros_of_a_masked_checkpoint_stay(tiny_checkpoint, recover_config, tmp_path, text_path, method):
    dense, sparse = tiny_checkpoint(), tmp_path / "sparse"
    keys = {
        "method": "unstructured", "masking.ratio": 0.5, "calibration.source": str(text_path), "calibration.windows": 3,
        "calibration.held_out": 2, "calibration.length": 16, "model.device": "cpu",
    }  # fmt: skip
    mask_checkpoint(str(dense), sparse, Config.load(overrides=keys))
    config = recover_config(train__method=method, train__rank=4, train__learning_rate=5e-3)
    report = recover(str(sparse), str(dense), tmp_path / "out", config).report
    assert report["kept"] == "trained"
    masks = Masks.load(tmp_path / "out" / "masks.safetensors")
    before, after = weights(sparse), weights(tmp_path / "out")
    for name in masks.packed:
        assert torch.equal(before[name] == 0, after[name] == 0) and not torch.equal(before[name], after[name])
