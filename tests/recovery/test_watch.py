"""What a training shows while it runs."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from structprune.errors import Interrupted
from structprune.recovery.held_out import Figures
from structprune.recovery.watch import Halt, Watch
from structprune.workers import Workers


@pytest.fixture
def titles(monkeypatch, recover_config):
    """`titles(first, log, measured, **keys)` -> what is shown after each step of two seconds; behind it, its
    figures of `measured` (divergence, NELBO) are noted."""

    def show(first, log, measured, **keys):
        now, shown = [50.0], []
        monkeypatch.setattr("structprune.recovery.watch.perf_counter", lambda: now[0])

        def track(items, title):
            for item in items:
                yield item
                shown.append(title())

        watch = Watch(10, recover_config(**keys), track)
        state, control = TrainerState(global_step=first, log_history=log), TrainerControl()
        now[0] += 30  # until it begins
        watch.on_train_begin(None, state, control)
        del shown[:]
        for figures in measured:
            now[0] += 2
            state.global_step += 1
            watch.on_step_end(None, state, control)
            watch.note(Figures(*(torch.tensor([each]).double() for each in figures), agreement=0.5, accuracy=0.5))
        assert not control.should_evaluate
        return shown

    return show


def test_the_bar_has_speed_and_the_best_of_what_is_learnt(titles):
    """With cross-entropy learnt too, the least divergence is not the best."""
    keys = {"loss__kl": 0.5, "loss__cross_entropy": 1.0}
    assert titles(0, [], [(1.0, 3.0), (0.8, 4.0), (0.9, 3.5)], **keys) == [
        "learning, 64 tokens/s",
        "learning, 64 tokens/s, held-out loss 3.500 (best 3.500), divergence 1.000, NELBO 3.000",
        "learning, 64 tokens/s, held-out loss 4.400 (best 3.500), divergence 0.800, NELBO 4.000",
    ]


def test_a_run_that_goes_on_shows_the_best_before_and_its_own_speed(titles):
    log = [{"step": 4, "eval_kl": 0.5, "eval_nelbo": 3.0, "eval_goal": 0.5}]
    assert titles(4, log, [(0.75, 3.25), (0.25, 3.0)]) == [
        "learning, 64 tokens/s, held-out loss 0.500 (best 0.500), divergence 0.500, NELBO 3.000",
        "learning, 64 tokens/s, held-out loss 0.750 (best 0.500), divergence 0.750, NELBO 3.250",
    ]


def test_a_process_that_ends_lets_the_others_save_and_end(monkeypatch):
    """At the same step: a checkpoint is written by all of them."""
    own, other = Interrupted("mine", 143), Interrupted("the other's", 130)

    def stop():
        raise own

    for watch, reasons, expected in (
        (lambda: None, [None, None], None), (lambda: None, [None, other], other), (stop, [own, other], own),
    ):  # fmt: skip
        monkeypatch.setattr(Workers, "gather", lambda self, value, reasons=reasons: reasons)
        control, halt = SimpleNamespace(should_save=False, should_training_stop=False), Halt(watch, Workers(0, 2))
        halt.on_step_end(None, None, control)
        assert control.should_save == control.should_training_stop == (expected is not None)
        if expected is None:
            halt.end()
        else:
            with pytest.raises(Interrupted) as caught:
                halt.end()
            assert caught.value is expected
