"""Broken directories of results, to go on in, to replace, or to compare with: one line, and nothing of it lost."""

import json
import os
import shutil
from pathlib import Path

import pytest

from structprune.cli.main import main

EVAL = ["eval", "MODEL", "--text", "TEXT", "--set", "evaluation.windows=2", "--set", "evaluation.length=16"]


@pytest.fixture(scope="module")
def finished(sound, tmp_path_factory):
    """The results of a small evaluation."""
    out = tmp_path_factory.mktemp("finished") / "results"
    names = {"MODEL": str(sound / "model"), "TEXT": str(sound / "text.txt")}
    assert main([*(names.get(word, word) for word in EVAL), "--set", "evaluation.noise=1", "--out", str(out)]) == 0
    return out


@pytest.fixture
def results(place, finished) -> Path:
    """A copy of them, to break."""
    shutil.copytree(finished, place / "old")
    return place / "old"


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BROKEN = {
    "settings empty": lambda old: change(old / "results.json", settings={}),
    "tasks empty": lambda old: change(old / "results.json", settings={"tasks": {}}),
    "tasks a list": lambda old: change(old / "results.json", settings={"tasks": []}),
    "a task a number": lambda old: change(old / "results.json", settings={"tasks": {"a": {"b": 3}}}),
    "files empty": lambda old: change(old / "results.json", files={}),
    "files a list": lambda old: change(old / "results.json", files=[]),
    "a file outside": lambda old: change(
        old / "results.json", files={"m": {"t": {"file": "/etc/hostname", "items": 1}}}
    ),
    "a file above": lambda old: change(old / "results.json", files={"m": {"t": {"file": "../../x", "items": 1}}}),
    "a long name": lambda old: change(old / "results.json", files={"m": {"t": {"file": "x" * 5000, "items": 1}}}),
    "half a pair": lambda old: change(old / "results.json", files={"m": {"t": {"file": "\ud800", "items": 1}}}),
    "summary a number": lambda old: change(old / "results.json", summary=5),
    "nested": lambda old: (old / "results.json").write_text("[" * 10**5),
    "a directory": lambda old: [(old / "results.json").unlink(), (old / "results.json").mkdir()],
    "rows cut": lambda old: [os.truncate(path, 5) for path in old.rglob("*.jsonl")],
    "rows gone": lambda old: [path.unlink() for path in old.rglob("*.jsonl")],
}


@pytest.mark.parametrize("name", BROKEN)
def test_results_to_compare_with(results, run_refused, name):
    BROKEN[name](results)
    line = run_refused(*EVAL, "--out", "OUT", "--against", str(results))
    assert "old" in line and "Error" not in line


FOREIGN = {  # what is there beside them, and what is said of it
    "a file": (lambda old: (old / "notes.txt").write_text("x"), "also holds 'notes.txt': move it away"),
    "a file among the items": (lambda old: (old / "items" / "notes.txt").write_text("x"), "holds 'items/notes.txt'"),
    "a directory": (lambda old: (old / "mine").mkdir(), "also holds 'mine'"),
    "a link": (lambda old: (old / "link").symlink_to(old / "results.json"), "also holds 'link'"),
    "a file for a directory": (
        lambda old: [(old / "results.json").unlink(), (old / "partial").write_text("x")], "also holds 'partial'"
    ),
    "a pipe": (
        lambda old: [
            (old / "results.json").unlink(), (old / "partial").mkdir(), os.mkfifo(old / "partial" / "rank-0.jsonl")
        ],
        "also holds 'partial/rank-0.jsonl'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_results_to_replace_beside_something_else(results, run_refused, name):
    """Refused before anything of the earlier results is removed."""
    add, said = FOREIGN[name]
    add(results)
    assert said in run_refused(*EVAL, "--out", str(results), "--overwrite", "--set", "evaluation.noise=2")


def test_a_pipe_for_a_directory(place, run_refused):
    os.mkfifo(place / "pipe")
    assert "pipe' is not a directory" in run_refused(*EVAL, "--out", str(place / "pipe"))
