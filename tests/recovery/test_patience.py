"""A training that ends where it gains no more, also one that was killed and goes on."""

import math

import pytest
import torch

from structprune.models.loading import load_model
from structprune.recovery.folder import last_checkpoint, training_folder
from structprune.recovery.watch import Patience
from structprune.runs import training as module
from structprune.runs.recover import recover


class Killed(BaseException):
    """A run that ends at once."""


def log(goals):
    """The Trainer's log of evaluations, with lines of something else between them."""
    return [line for goal in goals for line in ({"loss": 1.0}, {"eval_goal": goal})]


@pytest.mark.parametrize(
    "goals, waited",
    [
        ([], 0),
        ([3.0], 0),
        ([3.0, 2.0, 1.0], 0),
        ([3.0, 3.0], 1),  # as good is no gain
        ([3.0, 4.0, 3.5], 2),
        ([3.0, 4.0, 2.0, 2.5], 1),
        ([math.nan, 4.0, math.nan], 1),
    ],
)
def test_evaluations_without_a_gain_are_counted_from_the_last_gain(goals, waited):
    assert [Patience(limit).ended(log(goals)) for limit in (1, 2, 3)] == [waited >= limit for limit in (1, 2, 3)]


@pytest.mark.slow
def test_patience_ends_a_training_that_gains_no_more(pair, recover_config, tmp_path):
    dense, small = pair()
    config = recover_config(train__learning_rate=3.0, train__patience=1, train__evaluations=12, train__clip=100.0)
    report = recover(str(small), str(dense), tmp_path / "out", config).report
    assert report["learnt"]["steps"] < 12 and report["tokens"] == 16 * 8 * report["learnt"]["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("killed", [3, 4, "writing"])
def test_a_killed_training_ends_where_one_that_was_not_does(
    pair, recover_config, tmp_path, monkeypatch, method, killed
):
    """Held-out text is measured after every step; the second time has the best figures."""
    dense, small = pair()
    whole, cut, steps = tmp_path / "whole", tmp_path / "cut", []

    class Vee(module.Watch):
        def note(self, figures):
            return super().note(figures) | {"goal": abs(len(self._shown) - 2)}

        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)
            if len(steps) == killed:
                raise Killed
            super().on_step_end(args, state, control, **kwargs)

    def end(*_, **__):
        raise Killed

    rank = {"train__rank": 4} if method == "lora" else {}
    config = recover_config(train__method=method, train__evaluations=12, train__patience=2, train__warmup=0, **rank)
    with monkeypatch.context() as patch:
        patch.setattr(module, "Watch", Vee)
        with pytest.raises(Killed), patch.context() as writing:
            writing.setattr(module, "save_masked", end)
            recover(str(small), str(dense), cut, config)
        first = int(last_checkpoint(training_folder(cut)).name.removeprefix("checkpoint-"))
        assert first == (4 if killed == "writing" else killed - 1)
        again = recover(str(small), str(dense), cut, config).report
        assert steps == [*range(1, first + 1), *([] if killed == "writing" else [killed]), *range(first + 1, 5)]
        report = recover(str(small), str(dense), whole, config).report
    assert (again["learnt"]["resumed_at"], again["learnt"]["steps"]) == (first, 4) and report["learnt"]["steps"] == 4
    assert again["history"] == report["history"] and len(report["history"]) == 4
    assert again["tokens"] == report["tokens"] == 16 * 8 * 4 and again["kept"] == report["kept"] == "trained"
    ours, theirs = (load_model(out, device="cpu").state_dict() for out in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
