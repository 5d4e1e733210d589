"""Results that survive being killed, and full disks."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from structprune.errors import UserError
from structprune.evaluation import result_state
from structprune.evaluation.result_files import ResultStore, read_results
from structprune.evaluation.result_state import clear_results


def test_from_start_to_end(tmp_path, settings, fill, finish):
    out = tmp_path / "deep" / "out"
    store = ResultStore(out, settings)
    fill(store, (3, 0, 2, 1))  # as buckets come, not in order
    assert store.done("dense", "notes") == {0, 1, 2, 3} and store.done("pruned", "notes") == set()
    result = finish(store)
    assert [row.key for row in result.rows["dense"]["notes"]] == [str(index) for index in range(8)]
    assert result.summary == {"items": 8} and result.settings == settings
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) == [
        "items", "items/dense", "items/dense/notes.jsonl", "results.json", "settings.json",
    ]  # fmt: skip
    lines = (out / "items/dense/notes.jsonl").read_text().splitlines()
    assert [json.loads(line)["nelbo"] for line in lines] == [1, 2] * 4
    assert read_results(out) == result


def test_the_same_command_again_finds_everything_done(tmp_path, settings, fill, finish):
    store = ResultStore(tmp_path, settings)
    fill(store, range(4))
    first = finish(store)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = ResultStore(tmp_path, settings)
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


def test_killed_in_the_middle(tmp_path, settings):
    """What was reported as kept is kept, and the line that was being written is no obstacle."""
    code = WRITER.format(settings=settings)
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    kept = [int(writer.stdout.readline()) for _ in range(3)]
    with pytest.raises(UserError, match="is being written by another run"):
        ResultStore(tmp_path, settings)
    time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    kept += map(int, writer.stdout.read().split())
    assert writer.wait() == -signal.SIGKILL
    store = ResultStore(tmp_path, settings)
    done = store.done("dense", "notes")
    assert done in (set(kept), {*kept, len(kept)})  # the last one may have been killed before it was reported
    store.close()


def test_the_results_of_a_living_run_are_not_cleared(tmp_path, settings, fill, finish):
    """Before its first chunk, in the midst, and where directories have no locks."""
    store, other = ResultStore(tmp_path, settings), ResultStore(tmp_path, settings, rank=1)
    for end in (lambda: None, lambda: fill(store, range(2)), store.close):
        end()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="is being written by another run: wait for it"):
            clear_results(tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    os.close(other._handle)
    other._handle = None
    with pytest.raises(UserError, match="is being written by another run: wait for it"):
        clear_results(tmp_path)
    other.close()
    clear_results(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_cannot_begin_while_another_clears(tmp_path, settings, monkeypatch):
    ResultStore(tmp_path, settings).close()
    refused = []

    def begin(directory):
        with pytest.raises(UserError, match="is being written by another run: wait for it"):
            ResultStore(directory, settings)
        refused.append(directory)

    monkeypatch.setattr(result_state, "erase", begin)
    clear_results(tmp_path)
    assert refused == [tmp_path] and (tmp_path / "settings.json").exists()


@pytest.mark.parametrize("stored, other", [(False, False), (True, False), (False, True)])
def test_an_error_before_anything_is_stored_leaves_nothing(tmp_path, stored, other, settings, fill):
    """What another process needs stays."""
    out = tmp_path / "deep" / "out"
    beside = ResultStore(out, settings, rank=1) if other else None
    with pytest.raises(UserError, match="damaged"), ResultStore(out, settings) as store:
        fill(store, range(stored))
        raise UserError("damaged")
    assert list(tmp_path.iterdir()) == ([out.parent] if stored or other else [])
    if beside:
        fill(beside, [0])
        beside.close()
    if stored or other:
        assert ResultStore(out, settings).done("dense", "notes") == {0}


@pytest.mark.parametrize("left", [1, 40, -1])  # bytes of the last line
def test_a_torn_line_is_written_anew(tmp_path, left, settings, fill, finish):
    store = ResultStore(tmp_path, settings)
    fill(store, range(3))
    store.close()
    path = tmp_path / "partial" / "rank-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:left])
    other = ResultStore(tmp_path, settings, rank=1)  # reads past the torn line of another
    assert other.done("dense", "notes") == {0, 1}
    other.close()
    store = ResultStore(tmp_path, settings)
    assert store.done("dense", "notes") == {0, 1}
    fill(store, (2, 3))
    assert path.read_bytes().count(b"\n") == 4
    assert len(finish(store).rows["dense"]["notes"]) == 8


def test_ranks_write_their_own_and_a_later_run_has_another_number(tmp_path, settings, fill, finish):
    stores = [ResultStore(tmp_path, settings, rank) for rank in range(3)]
    fill(stores[0], [0])
    fill(stores[1], [1, 2], value=5.0)
    fill(stores[2], [2], value=9.0)  # again: the first wins
    for store in stores:
        store.close()
    store = ResultStore(tmp_path, settings)
    assert store.done("dense", "notes") == {0, 1, 2}
    fill(store, [3])
    assert [row.nelbo for row in finish(store).rows["dense"]["notes"]] == [1, 2, 5, 6, 5, 6, 1, 2]


def test_the_end_sees_what_other_processes_wrote_meanwhile(tmp_path, settings, fill, finish):
    stores = [ResultStore(tmp_path, settings, rank) for rank in range(2)]
    fill(stores[1], [1, 3])
    fill(stores[0], [0, 2])
    assert len(finish(stores[0]).rows["dense"]["notes"]) == 8
    assert ResultStore(tmp_path, settings).finished


def test_killed_before_the_summary_is_written(tmp_path, settings, fill, finish):
    store = ResultStore(tmp_path, settings)
    fill(store, range(4))

    def die(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish(store, die)
    store.close()
    again = ResultStore(tmp_path, settings)
    assert not again.finished and again.done("dense", "notes") == {0, 1, 2, 3}
    assert finish(again).summary == {"items": 8}


def test_killed_before_the_partial_files_are_gone(tmp_path, settings, fill, finish):
    store = ResultStore(tmp_path, settings)
    fill(store, range(4))
    finish(store)
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "rank-0.jsonl").write_text("{")
    assert finish(ResultStore(tmp_path, settings)).summary == {"items": 8}
    assert not (tmp_path / "partial").exists()


def test_missing_items_are_told(tmp_path, settings, fill, finish):
    store = ResultStore(tmp_path, settings)
    fill(store, (0, 3))
    with pytest.raises(UserError, match="lacks 4 of 8 items of task 'notes' of 'dense' .first '2'.: run the same"):
        finish(store)
    fill(store, (1, 2))
    assert len(finish(store).rows["dense"]["notes"]) == 8


def test_a_draft_of_a_killed_start_is_no_obstacle_and_goes(tmp_path, settings, fill, finish):
    drafts = [tmp_path / ".settings.json.0.123.tmp", tmp_path / ".results.json.4f.tmp"]
    other = tmp_path / ".notes.tmp"  # of somebody else
    for path in (*drafts, other):
        path.write_text("{")
    store = ResultStore(tmp_path, settings)
    assert not store.finished
    fill(store, range(4))
    finish(store)
    assert other.exists() and not any(path.exists() for path in drafts)


def test_a_full_disk(tmp_path, monkeypatch, settings, fill, finish):
    """Half a line fits; the next chunk begins where that one began."""
    store = ResultStore(tmp_path, settings)
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
