"""The check of killed trainings: what it compares, on commands of its own and on one training of a moment."""

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
    with pytest.raises(UserError, match="recover failed: no such model"):
        check.run([sys.executable, "-c", "import sys; sys.exit('no such model')"])


def test_what_was_kept_is_told(check, tmp_path):
    assert check.kept_in(tmp_path) == "nothing"
    (tmp_path / check.BLOCKS).mkdir()
    (tmp_path / check.BLOCKS / "block-00000.safetensors").touch()
    assert check.kept_in(tmp_path) == "1 block"
    for step in (8, 16):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert check.kept_in(tmp_path) == "step 16"


def test_other_bytes_are_seen_and_times_are_not(check, tmp_path):
    for name, weights, seconds in (("a", b"1", 3), ("b", b"1", 4), ("c", b"2", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        last = {"before": 2, "after": 1, "history": [], "kept": "trained", "tokens": 5, "seconds": seconds}
        (tmp_path / name / "report.json").write_text(json.dumps({"recoveries": [last]}), encoding="utf-8")
    a, b, c = (check.contents(tmp_path / name) for name in "abc")
    assert a == b != c and check.figures(tmp_path / "a") == check.figures(tmp_path / "b")


def test_no_kills_are_refused(check, tmp_path, capsys):
    assert check.main(["--kills", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert "--kills = 0: give at least 1" in capsys.readouterr().err and not list(tmp_path.iterdir())
