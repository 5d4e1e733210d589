"""Directories of results that are refused: of other settings, of something else, or damaged."""

import json
from pathlib import Path

import pytest

from structprune.errors import UserError
from structprune.evaluation.result_files import ResultStore, read_results
from structprune.evaluation.result_state import clear_results, is_resumable
from structprune.evaluation.results import setting_differences


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
def test_other_settings_are_refused_and_may_be_cleared(tmp_path, changed, words, finished, settings, fill, finish):
    store = ResultStore(tmp_path, settings)
    fill(store, range(4))
    if finished:
        finish(store)
    store.close()
    with pytest.raises(UserError) as result:
        ResultStore(tmp_path, {**settings, **changed})
    assert words in str(result.value) and "--overwrite" in str(result.value) and "another --out" in str(result.value)
    clear_results(tmp_path)
    assert list(tmp_path.iterdir()) == []
    store = ResultStore(tmp_path, {**settings, **changed})
    assert store.done("dense", "notes") == set() and not store.finished


def test_settings_are_compared_as_they_are_read():
    assert setting_differences({"a": [1, 2], "b": {"c": {}}}, {"a": [1, 2], "b": {"c": {}}}) == []
    assert setting_differences({"a": "x" * 200}, {"a": None}) == [f'a was "{"x" * 76}... and is null']
    store_settings = {"a": (1, 2)}
    assert json.loads(json.dumps(store_settings)) == {"a": [1, 2]}


def test_a_directory_of_something_else_is_left_alone(tmp_path, settings):
    (tmp_path / "thesis.tex").write_text("x")
    for act in (lambda: ResultStore(tmp_path, settings), lambda: clear_results(tmp_path)):
        with pytest.raises(UserError, match="holds something else than results: choose another --out"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_process_of_the_run_may_begin_while_this_one_looks(tmp_path, settings, monkeypatch):
    """The settings are written by another process just after they were looked for."""
    is_file = Path.is_file

    def then_written(path: Path) -> bool:
        result = is_file(path)
        if path.name == "settings.json" and not result:
            path.write_text(json.dumps({"settings": settings}))
        return result

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_file", then_written)
    ResultStore(tmp_path / "out", settings).close()
    assert (tmp_path / "out" / "partial" / "rank-0.jsonl").exists()


def test_a_file_is_no_directory(tmp_path, settings):
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below", "x" * 256):
        with pytest.raises(UserError, match="cannot be written|is not a directory"):
            ResultStore(tmp_path / place, settings)
        with pytest.raises(UserError, match="cannot be written|is not a directory"):
            clear_results(tmp_path / place)
    clear_results(tmp_path / "absent")


@pytest.fixture
def results(tmp_path, settings, fill, finish) -> Path:
    """A directory of whole results."""
    store = ResultStore(tmp_path, settings)
    fill(store, range(4))
    finish(store)
    return tmp_path


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
def test_unusable_results(results, spoil, words):
    spoil(results)
    with pytest.raises(UserError) as result:
        read_results(results)
    assert words in str(result.value) and "\n" not in str(result.value)


def test_a_damaged_line_before_the_last_is_told(tmp_path, settings, fill):
    store = ResultStore(tmp_path, settings)
    fill(store, range(2))
    store.close()
    edit(tmp_path / "partial" / "rank-0.jsonl", lambda text: text.replace('"chunk"', '"chank"', 1))
    with pytest.raises(UserError, match="line 1 of '.*rank-0.jsonl' is damaged"):
        ResultStore(tmp_path, settings)


@pytest.mark.parametrize("change", [{"rows": [{}]}, {"rows": ["x"]}])
def test_rows_that_are_none_are_not_gone_on_with(tmp_path, settings, fill, change):
    store = ResultStore(tmp_path, settings)
    fill(store, range(2))
    store.close()
    path = tmp_path / "partial" / "rank-0.jsonl"
    edit(path, lambda text: json.dumps(json.loads(text.splitlines()[0]) | change) + "\n")
    assert not is_resumable(tmp_path, settings)


@pytest.mark.parametrize("name", [None, "settings.json", "partial/rank-0.jsonl"])
def test_what_is_damaged_is_not_gone_on_with(tmp_path, settings, fill, name):
    """Else --overwrite, which the refusal names, would end in the same refusal."""
    store = ResultStore(tmp_path, settings)
    fill(store, range(2))
    store.close()
    if name is not None:
        edit(tmp_path / name, lambda text: text.replace('"', "'", 1))
    assert is_resumable(tmp_path, settings) == (name is None)
    clear_results(tmp_path)
    assert not ResultStore(tmp_path, settings).done("dense", "notes")


@pytest.mark.parametrize(
    "change", [{"rows": 3}, {"chunk": [0]}, {"rows": [{}]}, {"rows": ["x"]}, {"task": None}, {"rows": [{"key": "0"}]}]
)
def test_a_damaged_chunk_is_one_line(tmp_path, change, settings, fill, finish):
    store = ResultStore(tmp_path, settings)
    fill(store, range(4))
    store.close()
    path = tmp_path / "partial" / "rank-0.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | change), *lines[1:]]) + "\n")
    with pytest.raises(UserError) as result:
        finish(ResultStore(tmp_path, settings))
    assert "\n" not in str(result.value)


@pytest.mark.parametrize("content", ["{}", "[]", '{"format": 1, "settings": []}', '{"format": 1, "settings": {}}'])
def test_damaged_results_are_one_line(tmp_path, content, settings, fill, finish):
    store = ResultStore(tmp_path, settings)
    fill(store, range(4))
    finish(store)
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="damaged: evaluate again"):
        finish(ResultStore(tmp_path, settings))
