"""`structprune prune --work --resume`: a killed run goes on to the same bytes; what is refused, in one line each."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from structprune.cli.main import main
from structprune.cli.work import stoppable
from structprune.config import ModelSettings
from structprune.errors import Interrupted, UserError
from structprune.models.journal import Journal
from structprune.runs import rooms
from structprune.runs.ghost import read_ghost
from structprune.runs.run import CALIBRATION
from structprune.runs.work import FORMAT, IDENTITY, Work, clear, kept_bytes, work_beside, working

METHODS = {"structured": ["--ratio", "0.5"], "masks": ["--method", "unstructured"], "2:4": ["--method", "nm"]}


@pytest.fixture
def arguments(tiny_checkpoint, text_path, prune_command):
    """`arguments(out, *more)`: of a short run on one tiny checkpoint."""
    checkpoint = tiny_checkpoint("llada")

    def make(out, *more):
        command = prune_command(checkpoint, out, text_path, *more)
        if "--method" not in more:
            return command
        pairs = zip(command, command[1:])  # masks have no structured.* keys
        idle = {place for place, pair in enumerate(pairs) if pair[1].startswith("structured.")}
        return [word for place, word in enumerate(command) if place not in idle and place - 1 not in idle]

    return make


@pytest.fixture
def killed(monkeypatch):
    """`killed(arguments, parts)`: run a command until it has kept so many parts."""

    def run(command, parts):
        keep, left = Journal.keep, [parts]

        def dying(self, *given, **named):
            keep(self, *given, **named)
            left[0] -= self.directory is not None and given[0] != CALIBRATION
            if left[0] == 0:
                raise Interrupted("killed", 137)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "keep", dying)
            assert main(command) == 137

    return run


def contents(out):
    """What a directory holds, but for what tells seconds."""
    timed = ("report.json", "README.md")
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in timed}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_killed_run_goes_on_to_the_same_bytes(method, arguments, killed, tmp_path):
    assert main(arguments(tmp_path / "whole", *method)) == 0
    assert not (tmp_path / "whole.work").exists()
    command = arguments(tmp_path / "out", *method)
    for _ in range(3):
        killed(command, 1)
        assert not (tmp_path / "out").exists() and (tmp_path / "out.work").is_dir()
    assert main(command) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not (tmp_path / "out.work").exists()


def test_named_work_stays_and_serves_another_ratio(arguments, tmp_path, monkeypatch, capsys):
    work = ["--work", str(tmp_path / "parts")]
    assert main(arguments(tmp_path / "a", "--ratio", "0.3", *work)) == 0
    assert "Taken from" not in capsys.readouterr().out  # what a run keeps and reads again is its own
    monkeypatch.setattr("structprune.structured.ranking._advance_with_grams", None)  # no score is measured again
    assert main(arguments(tmp_path / "b", "--ratio", "0.5", *work, "--resume", "required")) == 0
    assert "Taken from finished parts: attention mass, losses, scores" in capsys.readouterr().out
    assert (tmp_path / "parts" / IDENTITY).exists()
    monkeypatch.undo()
    assert main(arguments(tmp_path / "c", "--ratio", "0.5")) == 0
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


def test_of_several_ratios_the_written_ones_stay(arguments, killed, tmp_path):
    command = arguments(tmp_path / "out", "--ratio", "0.3,0.5")
    parts = 0
    while not (tmp_path / "out" / "ratio-0.3" / "config.json").exists():
        killed(command, 1)
        parts += 1
        assert parts < 60
    first = (tmp_path / "out" / "ratio-0.3" / "report.json").stat().st_mtime_ns
    assert main(command) == 0
    assert (tmp_path / "out" / "ratio-0.3" / "report.json").stat().st_mtime_ns == first
    assert main(arguments(tmp_path / "whole", "--ratio", "0.3,0.5")) == 0
    for name in ("ratio-0.3", "ratio-0.5"):
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "whole" / name)


CHANGES = {
    "calibration.windows": "calibration.windows = 4, not 6", "calibration.seed": "calibration.seed = 0, not 5",
    "sink.policy": "sink.policy = 'all', not 'unstable'", "model.dtype": "model.dtype = ",
}  # fmt: skip
VALUES = {"calibration.windows": "6", "calibration.seed": "5", "sink.policy": "unstable", "model.dtype": "bfloat16"}


@pytest.mark.parametrize("key", CHANGES)
def test_changed_settings_are_refused_by_name(key, arguments, killed, tmp_path, capsys):
    killed(arguments(tmp_path / "out", "--set", "calibration.windows=4"), 2)
    capsys.readouterr()
    changed = ["--set", "calibration.windows=4", "--set", f"{key}={VALUES[key]}"]
    assert main(arguments(tmp_path / "out", *changed)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"'{tmp_path / 'out.work'}' has parts of a run with {CHANGES[key]}" in line and "--resume never" in line
    assert not (tmp_path / "out").exists()
    assert main(arguments(tmp_path / "out", *changed, "--resume", "never")) == 0


def test_other_weights_and_text_are_refused(tiny_checkpoint, text_path, prune_command, killed, tmp_path, capsys):
    checkpoint, out = tiny_checkpoint("llada"), tmp_path / "out"
    killed(prune_command(checkpoint, out, text_path), 2)
    other = tmp_path / "other.txt"
    other.write_text(text_path.read_text(encoding="utf-8") + "more", encoding="utf-8")
    capsys.readouterr()
    assert main(prune_command(checkpoint, out, other)) == 2
    assert "parts of a run with another text: give the same" in capsys.readouterr().err
    assert main(prune_command(tiny_checkpoint("llada", seed=7, name="another"), out, text_path)) == 2
    assert "parts of a run with another checkpoint: give the same" in capsys.readouterr().err


def test_windows_of_a_text_that_changed_under_its_name_are_refused(arguments, killed, tmp_path, capsys):
    killed(arguments(tmp_path / "out"), 2)
    Journal(tmp_path / "out.work").keep("calibration", notes="of other windows")
    capsys.readouterr()
    assert main(arguments(tmp_path / "out")) == 2
    assert "has parts of a run on other calibration windows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key", ["device", "version of structprune", "version of torch", "version of transformers", "calibration.length"]
)
def test_another_machine_or_version_is_refused(key, arguments, killed, tmp_path, capsys):
    killed(arguments(tmp_path / "out"), 2)
    path = tmp_path / "out.work" / IDENTITY
    identity = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(identity | {key: "other"}), encoding="utf-8")
    capsys.readouterr()
    assert main(arguments(tmp_path / "out")) == 2
    assert f"parts of a run with {key} = 'other', not {identity[key]!r}" in capsys.readouterr().err


WRONG = {
    "no parts": (["--resume", "required"], "--resume required, and '{out}.work' has no part of a run"),
    "mode": (["--resume", "always"], "unknown --resume 'always': give auto, required, never"),
    "something else": (["--work", "{tmp}/other"], "'{tmp}/other', where finished parts would be kept, is something"),
    "inside": (["--work", "{out}/parts"], "--work {out}/parts and '{out}' lie in each other"),
    "recover": (["--recover", "--work", "{tmp}/parts"], "--recover keeps what it has finished beside its outputs"),
}  # fmt: skip


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG)
def test_work_that_cannot_be_is_refused(options, message, arguments, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine", encoding="utf-8")
    places = {"out": tmp_path / "out", "tmp": tmp_path}
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments(tmp_path / "out", *(option.format(**places) for option in options))) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message.format(**places) in line and sorted(tmp_path.rglob("*")) == before


def test_a_run_that_fails_before_its_first_part_leaves_nothing(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("structprune.runs.load.load_model", lambda *_, **__: 1 / 0)
    assert main(arguments(tmp_path / "out")) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err and not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_search_at_three_ratios_goes_on_to_the_same_bytes(arguments, killed, tmp_path):
    """The levels are made around the plans of all, also of those that are written."""
    search = ["--set=search.enabled=true", "--set=search.method=knapsack", "--set=search.rounds=1"]
    search += ["--set=search.sequences=4", "--set=search.levels=2"]
    command = arguments(tmp_path / "out", "--ratio", "0.2,0.4,0.6", *search)
    for _ in range(60):
        killed(command, 6)
        if (tmp_path / "out" / "ratio-0.2" / "config.json").exists():
            break
    assert main(command) == 0 and main(arguments(tmp_path / "whole", "--ratio", "0.2,0.4,0.6", *search)) == 0
    for name in ("ratio-0.2", "ratio-0.4", "ratio-0.6"):
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "whole" / name)


def test_another_output_in_the_place_of_a_written_one_is_not_taken_for_it(arguments, killed, tmp_path, capsys):
    command = arguments(tmp_path / "out", "--ratio", "0.3,0.5")
    while not (tmp_path / "out" / "ratio-0.3" / "config.json").exists():
        killed(command, 4)
    shutil.rmtree(tmp_path / "out" / "ratio-0.3")
    assert main(arguments(tmp_path / "out" / "ratio-0.3", "--ratio", "0.2", "--no-refit")) == 0
    capsys.readouterr()
    assert main(command) == 2
    assert f"'{tmp_path / 'out' / 'ratio-0.3'}'" in capsys.readouterr().err


def test_files_of_others_stay_when_the_work_goes(arguments, tmp_path):
    work = tmp_path / "out.work"
    work.mkdir()
    assert main(arguments(tmp_path / "out")) == 0 and not work.exists()  # empty, it was as good as ours
    assert main(arguments(tmp_path / "a", "--work", str(work))) == 0
    (work / "notes.txt").write_text("mine", encoding="utf-8")
    (work / ".plain-1.safetensors.0a0b0c0d.tmp").touch()  # of a kill
    assert main(arguments(tmp_path / "b", "--work", str(work), "--resume", "never")) == 0
    clear(work)
    assert [path.name for path in work.iterdir()] == ["notes.txt"]


def test_levels_within_the_work_are_refused(arguments, tmp_path, capsys):
    levels = tmp_path / "out.work" / "levels"
    command = arguments(tmp_path / "out", "--set", "search.enabled=true", "--levels", str(levels))
    assert main(command) == 2
    assert f"--work {tmp_path / 'out.work'} and '{levels}' lie in each other" in capsys.readouterr().err


def test_two_runs_in_one_work_do_not_meet(arguments, tmp_path, capsys):
    work = Work(tmp_path / "parts", stays=True)
    with working(work, lambda: {"format": FORMAT}):
        assert main(arguments(tmp_path / "out", "--work", str(work.directory), "--resume", "never")) == 2
    assert f"another run works in '{work.directory}': wait for it" in capsys.readouterr().err


def test_room_is_asked_for_what_is_missing(arguments, killed, tmp_path, monkeypatch, capsys):
    command = arguments(tmp_path / "out", "--method", "unstructured")
    killed(command, 3)
    asked: list = []
    check = rooms.check_rooms
    monkeypatch.setattr(rooms, "check_rooms", lambda each: asked.extend(each) or check(each))
    assert main(command) == 0
    size, again = [room.needed for room in asked if room.path == tmp_path / "out.work"]  # before and after loading
    assert size == again and 0 < size < kept_bytes(tmp_path) + 10**6


def test_a_hub_id_is_known_by_its_revision(tiny_checkpoint, text_path, prune_command, killed, tmp_path, monkeypatch):
    """Weights that are not on this machine yet have no fingerprint."""
    cache = tiny_checkpoint("llada", name="0123abcd")
    ghost = replace(read_ghost(cache, ModelSettings()), name="org/model", hub=True)
    (cache / "model.safetensors").unlink()
    assert ghost.identity() == "org/model@0123abcd"
    with pytest.raises(UserError, match="weights"):
        replace(ghost, hub=False).identity()
    assert main(prune_command(cache, tmp_path / "out", text_path, "--dry-run")) == 0  # of config.json alone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_where_its_parts_are_kept(number, arguments, tmp_path, monkeypatch, capsys):
    """As long as the handler is ours: a shell in the background hands down one that ignores SIGINT."""
    keep, names, before = Journal.keep, [], signal.signal(number, signal.default_int_handler)

    def signalled(self, *given, **named):
        names.append(given[0])
        if given[0] == "block-001":
            os.kill(os.getpid(), number)
        keep(self, *given, **named)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "keep", signalled)
            assert main(arguments(tmp_path / "out")) == 128 + number
    finally:
        signal.signal(number, before)
    assert names[-1] == "block-001" and Journal(tmp_path / "out.work").has("calibration")  # it was finished
    line = f"structprune: interrupted; finished parts are kept in {tmp_path / 'out.work'}: the same command goes on"
    assert (
        capsys.readouterr().err.splitlines() == [line] and len(list((tmp_path / "out.work").rglob("block-001*"))) == 1
    )
    assert main(arguments(tmp_path / "out")) == 0 and main(arguments(tmp_path / "whole")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable(Work(tmp_path / "parts"), [tmp_path / "out"]):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("out, place", [("x", "x.work"), ("a/../x", "x.work"), ("/", "/structprune.work")])
def test_places_beside_outputs(out, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert work_beside(Path(out)) == tmp_path / place
    assert work_beside(Path(".")) == tmp_path.with_name(f"{tmp_path.name}.work")
