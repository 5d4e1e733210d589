"""The check of killed commands: what it compares, on commands of its own."""

import json
import sys

import pytest

from structprune.errors import UserError


@pytest.fixture
def check(scripts):
    return scripts("check_kills")


def test_a_command_is_killed_only_while_it_runs(check, tmp_path):
    place = tmp_path / "late"
    slow = [sys.executable, "-c", f"import time; time.sleep(20); open({str(place)!r}, 'w')"]
    assert check.killed(slow, 0.3) and not place.exists()
    assert not check.killed([sys.executable, "-c", ""], 30)


def test_a_failure_is_named(check):
    with pytest.raises(UserError, match="structprune recover failed: no such model"):
        check.run([sys.executable, "-c", "import sys; sys.exit('no such model')", "recover"])


def test_what_was_kept_is_told(check, tmp_path):
    out = tmp_path / "out"
    assert check.kept_of(out) == "nothing"
    parts = check.work_beside(out) / "scores"
    parts.mkdir(parents=True)
    for name in ("paths", "mass"):
        (parts / f"{name}.safetensors").touch()
    assert check.kept_of(out) == "2 parts"
    blocks = check.training_folder(out) / check.BLOCKS
    blocks.mkdir(parents=True)
    (blocks / "block-00000.safetensors").touch()
    assert check.kept_of(out) == "1 block"
    for step in (8, 16):
        (check.training_folder(out) / f"checkpoint-{step}").mkdir()
    assert check.kept_of(out) == "step 16"


def test_other_bytes_are_seen_and_times_are_not(check, tmp_path):
    for name, weights, seconds in (("a", b"1", 3), ("b", b"1", 4), ("c", b"2", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        last = {"before": 2, "after": 1, "history": [], "kept": "trained", "tokens": 5, "seconds": seconds}
        (tmp_path / name / "report.json").write_text(json.dumps({"recoveries": [last]}), encoding="utf-8")
    a, b, c = (check.contents(tmp_path / name) for name in "abc")
    assert a == b != c and check.figures(tmp_path / "a") == check.figures(tmp_path / "b")


def test_a_command_is_killed_and_compared(check, monkeypatch, tmp_path):
    text = "import json, pathlib, sys, time; out = pathlib.Path(sys.argv[1]); time.sleep(0.5); out.mkdir(parents=True);"
    text += "(out / 'w').write_text('same'); (out / 'report.json').write_text(json.dumps({'seconds': time.time()}))"
    monkeypatch.setattr(check, "command", lambda name, pruned, out: [sys.executable, "-c", text, str(out)])
    moments = iter([0.6, 0.3])
    monkeypatch.setattr(check.random.Random, "uniform", lambda self, low, high: high * next(moments))
    result = check.compare("masks", tmp_path, tmp_path, 2)
    assert result["rows"][0]["moment"] == result["undisturbed"] * 0.3  # the earliest first
    assert [row["same_bytes"] and row["same_figures"] and row["killed"] for row in result["rows"]] == [True, True]


def test_no_kills_are_refused(check, tmp_path, capsys):
    assert check.main(["--kills", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert "--kills = 0: give at least 1" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_commands_that_are_left_out_keep_their_results(check, monkeypatch, tmp_path):
    out, row = tmp_path / "x.json", {"moment": 1.0, "killed": True, "kept": "nothing", "again": 1.0, "lost": 1.0}
    result = {"undisturbed": 2.0, "rows": [row | {"same_bytes": True, "same_figures": True}]}
    monkeypatch.setattr(check, "compare", lambda *_: result)
    monkeypatch.setattr(check, "pruned_model", lambda *_: tmp_path)
    assert check.main(["--commands", "recover,masks", "--out", str(out)]) == 0
    assert check.main(["--commands", "structured", "--out", str(out)]) == 0
    assert list(json.loads(out.read_text())["commands"]) == ["structured", "masks", "recover"]
    monkeypatch.setitem(check.COMMANDS, "masks", (["--method", "nm"], {}))  # is given other options now
    assert list(check.earlier_results(out)) == ["structured", "recover"]


@pytest.mark.parametrize(
    "arguments, text, message",
    [
        (["--commands", "odd"], None, "--commands 'odd': give structured, "),
        ([], '{"commands": {"masks": {}}}', "has no commands with a machine, it is of another version: give another"),
        ([], "{}", "has no commands with a machine, it is of another version: give another --out"),
    ],
)
def test_what_cannot_be_merged_is_refused(check, tmp_path, capsys, arguments, text, message):
    out = tmp_path / "x.json"
    if text:
        out.write_text(text)
    assert check.main([*arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err and out.exists() == bool(text)
