"""Results that survive being killed, and directories that are refused."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from structprune.errors import UserError
from structprune.evaluation.result_files import ResultStore, clear_results, read_results, setting_differences
from structprune.evaluation.results import Window

SETTINGS = {"seed": 0, "tasks": ["notes"], "checkpoints": {"dense": "abc", "pruned": "def"}}
ITEMS = {"dense": {"notes": [str(index) for index in range(8)]}}


def rows(chunk, value=1.0):
    """Chunk n holds items 2n and 2n + 1."""
    return [Window("notes", str(2 * chunk + index), value + index, 3.0, 2, 4, 4) for index in range(2)]


def fill(store, chunks, value=1.0):
    for chunk in chunks:
        store.add("dense", "notes", chunk, rows(chunk, value))


def count(found):
    return {"items": len(found["dense"]["notes"])}


def finish(store):
    return store.finish(ITEMS, count)


def test_from_start_to_end(tmp_path):
    out = tmp_path / "deep" / "out"
    store = ResultStore(out, SETTINGS)
    fill(store, (3, 0, 2, 1))  # as buckets come, not in order
    assert store.done("dense", "notes") == {0, 1, 2, 3} and store.done("pruned", "notes") == set()
    found = finish(store)
    assert [row.key for row in found.rows["dense"]["notes"]] == ITEMS["dense"]["notes"]
    assert found.summary == {"items": 8} and found.settings == SETTINGS
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) == [
        "items", "items/dense", "items/dense/notes.jsonl", "results.json", "settings.json",
    ]  # fmt: skip
    lines = (out / "items/dense/notes.jsonl").read_text().splitlines()
    assert [json.loads(line)["nelbo"] for line in lines] == [1, 2] * 4
    assert read_results(out) == found


def test_the_same_command_again_finds_everything_done(tmp_path):
    store = ResultStore(tmp_path, SETTINGS)
    fill(store, range(4))
    first = finish(store)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = ResultStore(tmp_path, SETTINGS)
    assert again.finished
    assert finish(again) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(RuntimeError):
        fill(again, [4])


WRITER = """
import sys
from structprune.evaluation.result_files import ResultStore
from structprune.evaluation.results import Window
store = ResultStore(sys.argv[1], {settings!r})
for chunk in range(100_000):
    long = "k" * 2_000_000  # so that it is likely to be killed in the middle of a line
    rows = [Window("notes", f"{{chunk}} {{text}}", 1.0, 3.0, 2, 4, 4) for text in ("short", long)]
    store.add("dense", "notes", chunk, rows)
    print(chunk, flush=True)
"""


def test_killed_in_the_middle(tmp_path):
    """What was reported as kept is kept, and the line that was being written is no obstacle."""
    code = WRITER.format(settings=SETTINGS)
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    kept = [int(writer.stdout.readline()) for _ in range(3)]
    with pytest.raises(UserError, match="is being written by another run"):
        ResultStore(tmp_path, SETTINGS)
    time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    kept += map(int, writer.stdout.read().split())
    assert writer.wait() == -signal.SIGKILL
    store = ResultStore(tmp_path, SETTINGS)
    done = store.done("dense", "notes")
    assert done in (set(kept), {*kept, len(kept)})  # the last one may have been killed before it was reported
    store.close()


@pytest.mark.parametrize("left", [1, 40, -1])  # bytes of the last line
def test_a_torn_line_is_written_anew(tmp_path, left):
    store = ResultStore(tmp_path, SETTINGS)
    fill(store, range(3))
    store.close()
    path = tmp_path / "partial" / "rank-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:left])
    other = ResultStore(tmp_path, SETTINGS, rank=1)  # reads past the torn line of another
    assert other.done("dense", "notes") == {0, 1}
    other.close()
    store = ResultStore(tmp_path, SETTINGS)
    assert store.done("dense", "notes") == {0, 1}
    fill(store, (2, 3))
    assert path.read_bytes().count(b"\n") == 4
    assert len(finish(store).rows["dense"]["notes"]) == 8


def test_ranks_write_their_own_and_a_later_run_has_another_number(tmp_path):
    stores = [ResultStore(tmp_path, SETTINGS, rank) for rank in range(3)]
    fill(stores[0], [0])
    fill(stores[1], [1, 2], value=5.0)
    fill(stores[2], [2], value=9.0)  # again: the first wins
    for store in stores:
        store.close()
    store = ResultStore(tmp_path, SETTINGS)
    assert store.done("dense", "notes") == {0, 1, 2}
    fill(store, [3])
    assert [row.nelbo for row in finish(store).rows["dense"]["notes"]] == [1, 2, 5, 6, 5, 6, 1, 2]


def test_the_end_sees_what_other_processes_wrote_meanwhile(tmp_path):
    stores = [ResultStore(tmp_path, SETTINGS, rank) for rank in range(2)]
    fill(stores[1], [1, 3])
    fill(stores[0], [0, 2])
    assert len(finish(stores[0]).rows["dense"]["notes"]) == 8
    assert ResultStore(tmp_path, SETTINGS).finished


def test_killed_before_the_summary_is_written(tmp_path):
    store = ResultStore(tmp_path, SETTINGS)
    fill(store, range(4))

    def die(found):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.finish(ITEMS, die)
    store.close()
    again = ResultStore(tmp_path, SETTINGS)
    assert not again.finished and again.done("dense", "notes") == {0, 1, 2, 3}
    assert finish(again).summary == {"items": 8}


def test_killed_before_the_partial_files_are_gone(tmp_path):
    store = ResultStore(tmp_path, SETTINGS)
    fill(store, range(4))
    finish(store)
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "rank-0.jsonl").write_text("{")
    assert finish(ResultStore(tmp_path, SETTINGS)).summary == {"items": 8}
    assert not (tmp_path / "partial").exists()


def test_missing_items_are_told(tmp_path):
    store = ResultStore(tmp_path, SETTINGS)
    fill(store, (0, 3))
    with pytest.raises(UserError, match="lacks 4 of 8 items of task 'notes' of 'dense' .first '2'.: run the same"):
        finish(store)
    fill(store, (1, 2))
    assert len(finish(store).rows["dense"]["notes"]) == 8


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"seed": 1}, "seed was 0 and is 1:"),
        ({"checkpoints": {"dense": "abc", "pruned": "xyz"}}, 'checkpoints.pruned was "def" and is "xyz"'),
        ({"checkpoints": {"dense": "abc"}}, 'checkpoints.pruned was "def" and is not set'),
        ({"seed": 1, "tasks": []}, 'seed was 0 and is 1 (and 1 more)'),
        ({"tasks": ["notes", "piqa"]}, 'tasks was ["notes"] and is ["notes", "piqa"]'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_and_may_be_cleared(tmp_path, changed, words, finished):
    store = ResultStore(tmp_path, SETTINGS)
    fill(store, range(4))
    if finished:
        finish(store)
    store.close()
    with pytest.raises(UserError) as found:
        ResultStore(tmp_path, {**SETTINGS, **changed})
    assert words in str(found.value) and "--overwrite" in str(found.value) and "another --out" in str(found.value)
    clear_results(tmp_path)
    assert list(tmp_path.iterdir()) == []
    store = ResultStore(tmp_path, {**SETTINGS, **changed})
    assert store.done("dense", "notes") == set() and not store.finished


def test_settings_are_compared_as_they_are_read():
    assert setting_differences({"a": [1, 2], "b": {"c": {}}}, {"a": [1, 2], "b": {"c": {}}}) == []
    assert setting_differences({"a": "x" * 200}, {"a": None}) == [f'a was "{"x" * 76}... and is null']
    store_settings = {"a": (1, 2)}
    assert json.loads(json.dumps(store_settings)) == {"a": [1, 2]}


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for act in (lambda: ResultStore(tmp_path, SETTINGS), lambda: clear_results(tmp_path)):
        with pytest.raises(UserError, match="holds something else than results: choose another --out"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        for act in (lambda: ResultStore(tmp_path / place, SETTINGS), lambda: clear_results(tmp_path / place)):
            with pytest.raises(UserError, match="cannot be written"):
                act()
    clear_results(tmp_path / "absent")


def test_a_draft_of_a_killed_start_is_no_obstacle(tmp_path):
    (tmp_path / ".settings.json.0.123.tmp").write_text("{")
    assert not ResultStore(tmp_path, SETTINGS).finished


def test_a_full_disk(tmp_path, monkeypatch):
    """Half a line fits; the next chunk begins where that one began."""
    store = ResultStore(tmp_path, SETTINGS)
    fill(store, [0])
    path, written = tmp_path / "partial" / "rank-0.jsonl", os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left while writing"):
        fill(store, [1])
    monkeypatch.setattr(os, "fsync", written)
    assert store.done("dense", "notes") == {0} and path.read_bytes().count(b"\n") == 1
    fill(store, [1, 2, 3])
    assert len(finish(store).rows["dense"]["notes"]) == 8


def finished(out: Path) -> Path:
    store = ResultStore(out, SETTINGS)
    fill(store, range(4))
    finish(store)
    return out


def edit(path, change):
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda out: (out / "results.json").unlink(), "are not finished: run the command that made them again"),
        (lambda out: [(out / name).unlink() for name in ("results.json", "settings.json")], "holds no results of"),
        (lambda out: edit(out / "results.json", lambda text: text[:100]), "results.json' is damaged"),
        (lambda out: edit(out / "results.json", lambda text: "[]"), "results.json' is damaged"),
        (lambda out: edit(out / "results.json", lambda text: text.replace('"files"', '"f"')), "is damaged"),
        (lambda out: edit(out / "results.json", lambda text: text.replace('"format": 1', '"format": 9')), "format 9"),
        (lambda out: (out / "items/dense/notes.jsonl").unlink(), "notes.jsonl' is missing"),
        (lambda out: edit(out / "items/dense/notes.jsonl", lambda text: text[: text.rindex("{")]), "has 7 items"),
        (lambda out: edit(out / "items/dense/notes.jsonl", lambda text: text.replace("{", "(", 1)), "line 1 of"),
    ],
)
def test_unusable_results(tmp_path, spoil, words):
    spoil(finished(tmp_path))
    with pytest.raises(UserError) as found:
        read_results(tmp_path)
    assert words in str(found.value) and "\n" not in str(found.value)


def test_a_damaged_line_before_the_last_is_told(tmp_path):
    store = ResultStore(tmp_path, SETTINGS)
    fill(store, range(2))
    store.close()
    edit(tmp_path / "partial" / "rank-0.jsonl", lambda text: text.replace('"chunk"', '"chank"', 1))
    with pytest.raises(UserError, match="line 1 of '.*rank-0.jsonl' is damaged"):
        ResultStore(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    "change", [{"rows": 3}, {"chunk": [0]}, {"rows": [{}]}, {"rows": ["x"]}, {"task": None}, {"rows": [{"key": "0"}]}]
)
def test_a_damaged_chunk_is_one_line(tmp_path, change):
    store = ResultStore(tmp_path, SETTINGS)
    fill(store, range(4))
    store.close()
    path = tmp_path / "partial" / "rank-0.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | change), *lines[1:]]) + "\n")
    with pytest.raises(UserError) as found:
        finish(ResultStore(tmp_path, SETTINGS))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("content", ["{}", "[]", '{"format": 1, "settings": []}', '{"format": 1, "settings": {}}'])
def test_damaged_results_are_one_line(tmp_path, content):
    store = ResultStore(tmp_path, SETTINGS)
    fill(store, range(4))
    finish(store)
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="damaged: evaluate again"):
        finish(ResultStore(tmp_path, SETTINGS))
