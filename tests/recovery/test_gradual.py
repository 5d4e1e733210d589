"""Pruned and trained back in one run: at one ratio, at several, on from each to the next, and after a kill."""

import json

import pytest
import torch

from structprune.errors import UserError
from structprune.models.fingerprint import fingerprint
from structprune.models.loading import load_model
from structprune.recovery.folder import training_folder
from structprune.runs import gradual as module
from structprune.runs.checkpoints import prune_checkpoint
from structprune.runs.gradual import ScheduleRun, prune_and_recover
from structprune.runs.recover import recover
from structprune.runs.stages import pruned_folder, pruned_model
from structprune.structured.plan import Plan

STEP = 16 * 8  # tokens of an optimiser step


class Killed(BaseException):
    """A run that ends at once."""


def weights(directory):
    return load_model(directory, device="cpu").state_dict()


def same(ours, theirs):
    ours, theirs = weights(ours), weights(theirs)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_one_ratio_is_what_two_commands_give(tiny_checkpoint, schedule, tmp_path):
    dense, asked = str(tiny_checkpoint()), schedule(0.5)
    [step] = prune_and_recover(dense, tmp_path / "out", asked)
    pruned = tmp_path / "alone" / "out"
    prune_checkpoint(dense, pruned, asked.at(0.5))
    recover(str(pruned), dense, tmp_path / "again", asked.recovery)
    assert same(tmp_path / "out", tmp_path / "again") and not same(tmp_path / "out", pruned)
    assert step.report["recoveries"][0]["student"] == "out" and step.report["ratio"] == pytest.approx(0.5, abs=0.04)
    assert names(tmp_path) == ["again", "alone", "llada-tiny", "out", "text.txt"]


def test_steps_of_a_schedule_learn_texts_of_their_own(tiny_checkpoint, schedule, tmp_path):
    """As `eval` is told of them: together they are what one training with all tokens learns."""
    run = ScheduleRun(str(tiny_checkpoint()), tmp_path / "out", schedule(0.2, 0.4, 0.6, gradual=True, steps=12))
    trainings = list(run._trainings.values())
    texts = [set(each._learnt_text(each.steps).tolist()) for each in trainings]
    assert [len(text) for text in texts] == [32, 32, 32] and len(set.union(*texts)) == 96
    assert set(trainings[0].part(0, 1)._learnt_text(12).tolist()) == set.union(*texts)
    assert trainings[1]._learnt_text(0).tolist() == []


@pytest.mark.slow
def test_a_gradual_schedule_prunes_what_was_trained_back(tiny_checkpoint, schedule, tmp_path):
    dense, out = tiny_checkpoint(), tmp_path / "out"
    steps = prune_and_recover(str(dense), out, schedule(0.2, 0.4, 0.6, gradual=True, steps=12))
    assert names(out) == ["ratio-0.2", "ratio-0.4", "ratio-0.6"]
    for ratio, step in zip((0.2, 0.4, 0.6), steps):
        report = step.report
        assert report["ratio_of_dense"] == pytest.approx(ratio, abs=0.04)
        assert report["recoveries"][0]["teacher"] == "llada-tiny" and len(report["recoveries"]) == 1
        assert report["recoveries"][0]["tokens"] == STEP * 4  # of 12 steps for all
    first, second, third = (step.report for step in steps)
    assert second["config"]["structured"]["ratio"] == pytest.approx(1 - 0.6 / (1 - first["ratio"]))
    left = (1 - first["ratio"]) * (1 - second["ratio"])
    assert third["config"]["structured"]["ratio"] == pytest.approx(1 - 0.4 / left)
    assert third["ratio_of_dense"] == pytest.approx(1 - left * (1 - third["ratio"]))
    counted = third["block_parameters"]["after"] / first["block_parameters"]["before"]
    assert third["ratio_of_dense"] == pytest.approx(1 - counted)
    assert [each["source"] for each in second["lineage"]] == ["llada-tiny", "llada-tiny"]
    assert [each["step"] for each in third["lineage"]] == ["pruned", "trained back"] * 2
    card = (out / "ratio-0.6" / "README.md").read_text(encoding="utf-8")
    share = f"{100 * third['ratio_of_dense']:.1f} %"
    assert f"In all, {share} of the block projections of `llada-tiny` were removed." in card


@pytest.mark.slow
def test_ratios_that_are_not_gradual_all_come_from_the_dense_model(tiny_checkpoint, schedule, tmp_path):
    dense, out = str(tiny_checkpoint("dream")), tmp_path / "out"
    steps = prune_and_recover(dense, out, schedule(0.3, 0.5))
    for ratio, step in zip((0.3, 0.5), steps):
        assert step.report["lineage"] == [] and step.report["source"] == "dream-tiny"
        assert step.report["recoveries"][0]["tokens"] == 4 * STEP
        alone = tmp_path / f"alone-{ratio}"
        prune_and_recover(dense, alone, schedule(ratio))
        assert same(step.directory, alone)


@pytest.mark.slow
def test_zeros_of_masks_are_trained_around(tiny_checkpoint, schedule, tmp_path):
    [step] = prune_and_recover(str(tiny_checkpoint()), tmp_path / "out", schedule(0.5, method="unstructured"))
    assert step.report["sparsity"]["total"] == pytest.approx(0.5, abs=0.02)
    after = weights(tmp_path / "out")
    zeros = sum(int((after[name] == 0).sum()) for name in step.report["sparsity"]["tensors"])
    assert zeros == step.report["parameters"]["zero"] and step.report["recoveries"][0]["kept"] == "trained"


@pytest.mark.slow
def test_a_plan_is_applied_and_trained(tiny_checkpoint, schedule, tmp_path):
    dense = str(tiny_checkpoint())
    prune_checkpoint(dense, tmp_path / "first", schedule().at(0.3))
    plan = Plan.load(tmp_path / "first" / "plan.json")
    [step] = prune_and_recover(dense, tmp_path / "out", schedule(plan=plan))
    assert Plan.load(step.directory / "plan.json") == plan and step.report["choice"] is None


STAGES = {  # whether gradual, what is called, in which call the run ends, and whether after it
    "in the second pruning": (True, "_prune_to", 2, False),
    "after the second pruning": (True, "_prune_to", 2, True),
    "after the first training": (True, "_train", 1, True),
    "after the last training": (True, "_train", 2, True),
    "after both prunings": (False, "_prune_to", 1, True),
    "between both trainings": (False, "_train", 2, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_between_stages_goes_on(tiny_checkpoint, schedule, tmp_path, monkeypatch, stage):
    gradual, name, call, after = STAGES[stage]
    dense, asked = str(tiny_checkpoint()), schedule(0.3, 0.6, gradual=gradual)
    whole = prune_and_recover(dense, tmp_path / "whole", asked)
    assert [step.report["recoveries"][0]["kept"] for step in whole] == ["trained", "trained"]
    original, calls = getattr(ScheduleRun, name), []
    places = {ratio: tmp_path / "cut" / f"ratio-{ratio}" for ratio in (0.3, 0.6)}

    def mortal(self, *args):
        calls.append(args)
        if len(calls) == call and not after:
            raise Killed
        original(self, *args)
        if len(calls) == call:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ScheduleRun, name, mortal)
        prune_and_recover(dense, tmp_path / "cut", asked)
    done = {ratio: fingerprint(place) for ratio, place in places.items() if place.exists()}
    runs = []
    for each in ("_prune_to", "_train"):
        work = getattr(ScheduleRun, each)
        monkeypatch.setattr(
            ScheduleRun, each, lambda self, *args, work=work, each=each: runs.append(each) or work(self, *args)
        )
    steps = prune_and_recover(dense, tmp_path / "cut", asked)
    assert runs.count("_train") == 2 - len(done) and [step.earlier for step in steps] == [r in done for r in places]
    assert all(fingerprint(places[ratio]) == before for ratio, before in done.items())
    assert all(same(place, tmp_path / "whole" / place.name) for place in places.values())
    assert names(tmp_path / "cut") == ["ratio-0.3", "ratio-0.6"]
    if after and name == "_prune_to":
        assert "_prune_to" not in runs


@pytest.mark.slow
def test_a_run_killed_in_a_training_goes_on_with_less_memory(
    tiny_checkpoint, schedule, tmp_path, dying_at, monkeypatch
):
    """Settings that decide no weights may change; the pruning is not done again."""
    dense, out = str(tiny_checkpoint()), tmp_path / "out"
    whole = prune_and_recover(dense, tmp_path / "whole", schedule(0.5, steps=6))

    with dying_at(5):
        prune_and_recover(dense, out, schedule(0.5, steps=6))
    assert pruned_model(out).exists() and training_folder(out).exists() and not out.exists()
    with pytest.raises(UserError, match="holds another training"):
        prune_and_recover(dense, out, schedule(0.5, steps=7))
    with pytest.raises(UserError, match="was pruned by another run: give the same checkpoint and settings, add --over"):
        prune_and_recover(dense, out, schedule(0.4, steps=6))
    monkeypatch.setattr(module, "prune_at_ratios", None)
    [step] = prune_and_recover(dense, out, schedule(0.5, steps=6, recovery={"train__pass_windows": 2}))
    assert step.report["recoveries"][0]["learnt"]["resumed_at"] == 3
    after, before = (each.report["recoveries"][0]["after"]["kl"] for each in (step, whole[0]))
    assert after == pytest.approx(before, rel=1e-4) and not pruned_folder(out).exists()


@pytest.mark.slow
def test_what_a_kill_left_beside_a_finished_output_is_removed(tiny_checkpoint, schedule, tmp_path, monkeypatch):
    dense, out = str(tiny_checkpoint()), tmp_path / "out"

    def fatal(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "close_pruned", fatal)
        prune_and_recover(dense, out, schedule(0.5))
    before = (out / "report.json").read_bytes()
    assert pruned_model(out).exists()
    [step] = prune_and_recover(dense, out, schedule(0.5))
    assert step.earlier and (out / "report.json").read_bytes() == before and not pruned_folder(out).exists()
    with pytest.raises(UserError, match=r"output '.*out' exists: choose another, or add --overwrite"):
        prune_and_recover(dense, out, schedule(0.5, steps=5))
    [step] = prune_and_recover(dense, out, schedule(0.5, steps=5), overwrite=True)
    assert not step.earlier and step.report["recoveries"][0]["tokens"] == 5 * STEP


@pytest.mark.slow
def test_a_pruning_that_fails_leaves_nothing(tiny_checkpoint, schedule, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("the text is too short")

    monkeypatch.setattr(ScheduleRun, "_prune_to", fail)
    with pytest.raises(UserError, match="too short"):
        prune_and_recover(str(tiny_checkpoint()), tmp_path / "out", schedule(0.3, 0.5))
    assert names(tmp_path) == ["llada-tiny", "text.txt"]


def test_parts_of_a_training_follow_each_other(pair, recover_config, tmp_path):
    """Together they learn what one training does, in its order and under its noise."""
    from structprune.runs.recover import checked

    dense, small = pair()
    whole = checked(str(small), str(dense), tmp_path / "out", recover_config(train__tokens=STEP * 7))
    parts = [whole.part(index, 3) for index in range(3)]
    assert [part.steps for part in parts] == [2, 2, 2] and whole.steps == 7
    items = [[window["index"].item() for window in part._learnt_windows(part.steps)] for part in parts]
    assert sum(items, []) == list(range(48))
    ours, theirs = parts[1]._learnt_windows(parts[1].steps)[5], whole._learnt_windows(whole.steps)[21]
    assert torch.equal(ours["noisy_ids"], theirs["noisy_ids"]) and ours["rate"] == theirs["rate"]
    assert len({json.dumps(each.identity) for each in (whole, *parts)}) == 4
    assert whole.part(0, 1).identity == whole.identity
