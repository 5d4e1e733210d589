"""Ctrl-C and SIGTERM end a training, and a pruning that is trained back, where what they did is kept."""

import os
import signal
from contextlib import contextmanager

import pytest
from transformers import Trainer

from structprune.cli.main import main
from structprune.models.journal import Journal
from structprune.recovery import cache
from structprune.recovery.blocks import BlockStage
from structprune.recovery.held_out import HeldOutStudy
from structprune.recovery.watch import Watch
from structprune.runs import checkpoints, recover
from structprune.runs.stages import pruned_model
from structprune.runs.training import Recovery

KEYS = [
    "data.length=16", "data.held_out=4", "data.noise=2", "train.method=full", "train.batch=4", "train.evaluations=2",
    "train.learning_rate=2e-3", f"train.tokens={16 * 4 * 8}",
]  # fmt: skip


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    """A signal whose handler is ours: a shell in the background hands down one that ignores SIGINT."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


@pytest.fixture
def signalled(number, monkeypatch):
    """`signalled(owner, name, when)` -> a context in which a call gets the process a signal before it begins."""

    @contextmanager
    def make(owner, name, when=lambda *given: True):
        original = getattr(owner, name)

        def call(*given, **named):
            if when(*given):
                os.kill(os.getpid(), number)
            return original(*given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, call)
            yield

    return make


@pytest.fixture
def training(tiny_checkpoint, text_path, tmp_path):
    """`training(out, *keys)` -> arguments of a training of 8 steps, measured after 4 and 8."""
    dense = tiny_checkpoint()

    def make(out, *keys) -> list[str]:
        command = ["recover", str(dense), "--teacher", str(dense), "--out", str(tmp_path / out)]
        command += ["--data", str(text_path), "--device", "cpu"]
        return [*command, *(f"--set={key}" for key in [*KEYS, "loss.kl=0", "loss.cross_entropy=1", *keys])]

    return make


def at_step(step):
    return lambda watch, args, state, *_: state.global_step == step


def weights(out):
    return (out / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 6, 8])
def test_a_training_ends_with_a_checkpoint_after_the_step_under_way(
    number, step, training, signalled, tmp_path, capsys
):
    folder = tmp_path / "out.training"
    with signalled(Watch, "on_step_end", at_step(step)):
        assert main(training("out")) == 128 + number
    line = f"structprune: interrupted; what is learnt is kept in {folder}: the same command goes on"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert (folder / f"checkpoint-{step}").exists() and not (tmp_path / "out").exists()
    assert main(training("out")) == 0 and main(training("whole")) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_first_stage_ends_after_the_block_under_way(number, training, signalled, tmp_path, capsys):
    blocks = f"blocks.tokens={16 * 4 * 2}"
    with signalled(BlockStage, "_learn"):
        assert main(training("out", blocks)) == 128 + number
    assert "what is learnt is kept in" in capsys.readouterr().err
    assert len(list((tmp_path / "out.training" / "blocks").iterdir())) == 1
    assert main(training("out", blocks)) == 0 and main(training("whole", blocks)) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_an_output_that_is_being_written_is_completed_and_shown(number, training, signalled, tmp_path, capsys):
    with signalled(recover, "save_finished"):
        assert main(training("out")) == 128 + number
    shown = capsys.readouterr()
    assert f"interrupted; '{tmp_path / 'out'}' was complete by then" in shown.err
    assert f"Wrote {tmp_path / 'out'} " in shown.out
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


@pytest.mark.slow
def test_a_pruning_that_is_trained_back_ends_where_it_is_kept(
    number, tiny_checkpoint, prune_command, text_path, signalled, tmp_path, capsys
):
    dense = tiny_checkpoint()

    def run(out, *more):
        sets = [f"--recover-set={key}" for key in KEYS]
        options = ["--device", "cpu", "--ratio", "0.3", "--recover", *sets, *more]
        return prune_command(dense, tmp_path / out, text_path, *options)

    at_block = "keep", lambda journal, name, *_: name == "block-001"
    with signalled(Journal, *at_block):
        assert main(run("out")) == 128 + number
    work = tmp_path / "out.work"
    line = f"structprune: interrupted; what is done is kept in {work}: the same command goes on"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert len(list(work.rglob("block-001*"))) == 1  # it was finished
    with signalled(Journal, *at_block):
        assert main(run("out", "--overwrite")) == 128 + number
    assert f"kept in {work}: the same command begins anew, as --overwrite says" in capsys.readouterr().err
    with signalled(checkpoints, "save_finished"):  # nothing is left of the pruning to end
        assert main(run("out")) == 128 + number
    assert pruned_model(tmp_path / "out").exists() and not (tmp_path / "out.training").exists()
    assert f"kept in {tmp_path / 'out.pruned'}: the same command goes on" in capsys.readouterr().err
    assert main(run("out")) == 0 and main(run("whole")) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


@pytest.mark.parametrize("owner, name", [(HeldOutStudy, "__init__"), (HeldOutStudy, "measure")])
def test_a_signal_before_the_first_step_ends_a_run_before_it(
    owner, name, number, training, signalled, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Recovery, "_train", None)  # is not reached
    with signalled(owner, name):
        assert main(training("out")) == 128 + number
    assert "structprune: interrupted; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_second_signal_ends_a_run_at_once(number, training, signalled, tmp_path, monkeypatch, capsys):
    with signalled(HeldOutStudy, "__init__"), signalled(HeldOutStudy, "__init__"):
        assert main(training("out")) == 128 + number
    assert "structprune: interrupted; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_checkpoint_that_is_not_whole_is_not_kept(number, training, signalled, tmp_path, capsys):
    """Of a second signal while the first one's checkpoint is written."""
    with signalled(Watch, "on_step_end", at_step(1)), signalled(Trainer, "_save_optimizer_and_scheduler"):
        assert main(training("out")) == 128 + number
    assert "structprune: interrupted; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_predictions_that_are_cached_are_named(number, training, signalled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "CHUNK", 16)
    arguments = [*training("out", "loss.kl=1"), "--teacher-cache", str(tmp_path / "cache")]
    with signalled(cache, "reference_predictions"):
        assert main(arguments) == 128 + number
    assert f"what is learnt is kept in {tmp_path / 'cache'}: the same command goes on" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 1 and not list(tmp_path.glob("out*"))
