"""`structprune prune` with --recover and --dry-run: what it prints, and what it refuses in one line."""

import json

import pytest

from structprune.cli.main import main
from structprune.runs import gradual
from structprune.runs.gradual import ScheduleRun

SMALL = [
    "data.length=16", "data.held_out=4", "data.noise=2", "train.method=full", "train.batch=4", "train.evaluations=1",
    "train.learning_rate=2e-3",
]  # fmt: skip


@pytest.fixture
def command(prune_command, text_path, tmp_path):
    """`command(checkpoint, *more)` -> arguments of a run of a moment, to `tmp_path / "out"`."""

    def make(checkpoint, *more, tokens=16 * 4 * 4) -> list[str]:
        sets = [f"--recover-set={pair}" for pair in (*SMALL, f"train.tokens={tokens}")]
        arguments = prune_command(checkpoint, tmp_path / "out", text_path, "--device", "cpu", *more)
        return [*arguments, *sets] if "--recover" in more else arguments

    return make


@pytest.mark.slow
def test_gradual_ratios_share_the_tokens(tiny_checkpoint, command, tmp_path, capsys):
    out = tmp_path / "out"
    run = command(tiny_checkpoint(), "--ratio", "0.5,0.3", "--recover", "--gradual")
    assert main(run) == 0
    printed = capsys.readouterr().out
    assert printed.index(f"Wrote {out / 'ratio-0.3'} ") < printed.index(f"Wrote {out / 'ratio-0.5'} ")
    assert "ratio-0.3, 128 tokens" in printed and "ratio-0.5, 128 tokens" in printed
    report = json.loads((out / "ratio-0.5" / "report.json").read_text())
    assert report["recoveries"][0]["text"] == "text.txt"  # what calibrates
    assert f"in all {100 * report['ratio_of_dense']:.1f} % of the block projections" in " ".join(printed.split())
    assert main(run) == 0
    assert f"{out / 'ratio-0.5'} is of an earlier run with the same request" in capsys.readouterr().out


@pytest.mark.slow
def test_narrow_text_is_warned_of(tiny_checkpoint, command, monkeypatch, capsys):
    monkeypatch.setattr("structprune.recovery.breadth.EPOCHS", 0.0)
    assert main(command(tiny_checkpoint(), "--ratio", "0.3", "--recover")) == 0
    assert "structprune: warning: the text 'text.txt' is narrow" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_run_says_what_it_keeps(tiny_checkpoint, command, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    run = command(tiny_checkpoint(), "--ratio", "0.3", "--recover")
    with monkeypatch.context() as patch:
        patch.setattr(ScheduleRun, "_prune_to", interrupt)
        assert main(run) == 130
    assert "nothing was written" in capsys.readouterr().err and not list(tmp_path.glob("out*"))
    with monkeypatch.context() as patch:
        patch.setattr(ScheduleRun, "_train", interrupt)
        assert main(run) == 130
    assert f"what is done is kept in {tmp_path / 'out.pruned'}: the same command goes on" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(ScheduleRun, "_train", interrupt)
        assert main([*run, "--overwrite"]) == 130
    assert "the same command begins anew, as --overwrite says" in capsys.readouterr().err
    monkeypatch.setattr(gradual, "prune_at_ratios", None)  # is not called again
    monkeypatch.setattr(gradual, "check_room", None)  # of a pruning that is done
    assert main(run) == 0 and [path.name for path in tmp_path.glob("out*")] == ["out"]


@pytest.mark.slow
def test_what_was_finished_is_shown_after_a_failure(tiny_checkpoint, command, tmp_path, monkeypatch, capsys):
    """In the second pruning of a gradual schedule, where nothing lies beside the outputs."""
    original = ScheduleRun._prune_to

    def second_fails(self, source, places, work):
        if "ratio-0.3" in source:
            raise KeyboardInterrupt
        original(self, source, places, work)

    monkeypatch.setattr(ScheduleRun, "_prune_to", second_fails)
    assert main(command(tiny_checkpoint(), "--ratio", "0.3,0.5", "--recover", "--gradual")) == 130
    printed, first = capsys.readouterr(), tmp_path / "out" / "ratio-0.3"
    assert f"Wrote {first} " in printed.out and f"what is done is kept in {first}: the same" in printed.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ratio-0.3"]


def test_a_dry_run_states_both_parts_of_every_ratio(tiny_checkpoint, command, tmp_path, capsys):
    run = command(tiny_checkpoint(), "--ratio", "0.3,0.6", "--recover", "--dry-run")
    assert main([*run, "--gradual"]) == 0
    printed = capsys.readouterr().out
    for ratio in ("0.3", "0.6"):
        assert f"at ratio {ratio}" in printed and f"ratio-{ratio}: 2 steps over 128 tokens" in printed
    assert printed.count("predicted memory of the training") == 2 and "Nothing was written." in printed
    assert main(run) == 0
    printed = capsys.readouterr().out
    assert "ratio-0.6: 4 steps over 256 tokens" in printed and "Warning" not in printed  # each has the whole budget
    assert main(command(tiny_checkpoint(), "--ratio", "0.3", "--recover", "--dry-run", tokens=10**6)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "Warning: the text" in printed and "lower train.tokens" in printed and printed.endswith("Nothing was written.")
    )
    assert main(command(tiny_checkpoint(), "--ratio", "0.3,0.6", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "at ratio 0.3" in printed and "at ratio 0.6" in printed and "training" not in printed
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_what_the_run_would(tiny_checkpoint, command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for more in (["--dry-run"], ["--dry-run", "--recover"]):
        assert main(command(tiny_checkpoint(), "--ratio", "0.3", *more)) == 2
        assert "exists: choose another, or add --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--recover", "--recover-set=train.token=5"], "unknown config key 'train.token' (did you mean 'tokens'"),
        (["--recover", "--recover-set=train.tokens=-1"], "config key train.tokens = -1"),
        (["--recover", "--recover-config", "no.yaml"], "no config file at 'no.yaml'"),
        (["--recover", "--recover-set=train.tokens=9"], "train.tokens = 9 is less than a step"),
        (["--recover", "--recover-set=train.rank=8"], "train.rank = 8 has no effect without train.method = lora"),
        (["--recover", "--recover-set=data.source=no.txt"], "no data text at 'no.txt'"),
        (["--recover", "--ratio", "0.3", "--gradual"], "a gradual schedule goes through several ratios"),
        (["--ratio", "0.3,0.5", "--gradual"], "--gradual has no effect without --recover: add it, or leave it out"),
        (["--recover-set=train.tokens=9"], "--recover-set has no effect without --recover"),
        (["--recover-config", "no.yaml"], "--recover-config has no effect without --recover"),
        (["--plan", "plan.json", "--dry-run"], "--dry-run counts what a ratio removes, not what a plan does"),
    ],
)
def test_what_is_refused(tiny_checkpoint, command, tmp_path, capsys, options, message):
    """A bad key of the training comes first, whatever else is wrong."""
    sets = [each for each in options if each.startswith("--recover-set")]
    run = [*command(tiny_checkpoint(), *(each for each in options if each not in sets)), *sets]
    assert main(run) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.glob("out*"))
    if "unknown" in message:
        assert main(["prune", "nowhere", *run[2:], "--set", "structured.rati=0.3"]) == 2
        assert message in capsys.readouterr().err
