"""Names of checkpoints and tasks."""

import pytest

from structprune.errors import UserError
from structprune.evaluation.labels import checkpoint_labels, safe_names


@pytest.mark.parametrize(
    "given, labels",
    [
        (["GSAI-ML/LLaDA-8B-Base", "out/small"], ["LLaDA-8B-Base", "small"]),
        (["a/model", "b/model", "c"], ["a-model", "b-model", "c"]),
        (["x/a/model", "y/a/model"], ["x-a-model", "y-a-model"]),
        (["/model", "b/model"], ["model", "b-model"]),
        (["out/Small", "in/small"], ["out-Small", "in-small"]),
        (["a b/ü:1?", "out/.hidden"], ["1-", "hidden"]),
        (["a/b-c", "a-b/c"], ["b-c", "c"]),
        (["b-m", "a/b/m", "c/b/m", "a/b-m"], ["b-m", "a-b-m", "c-b-m", "a-b-m-2"]),
    ],
)
def test_labels(given, labels):
    assert checkpoint_labels(given) == labels


def test_a_directory_named_by_a_dot(tmp_path, monkeypatch):
    (tmp_path / "pruned" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "pruned")
    assert checkpoint_labels([".", "inner"]) == ["pruned", "inner"]
    with pytest.raises(UserError, match="checkpoint 'inner/..' is given twice"):
        checkpoint_labels([".", "inner/.."])


def test_long_names_stay_apart():
    labels = checkpoint_labels(["a/" + "x" * 300, "a/" + "x" * 301])
    assert len(set(labels)) == 2 and all(len(label) < 110 for label in labels)


def test_twice_the_same():
    with pytest.raises(UserError, match="checkpoint 'a/m/' is given twice"):
        checkpoint_labels(["a/m", "b", "a/m/"])


def test_tasks_as_file_names():
    assert safe_names(["piqa", "text/a.txt", "text:a.txt", ".."]) == {
        "piqa": "piqa", "text/a.txt": "text-a.txt", "text:a.txt": "text-a.txt-2", "..": "unnamed",
    }  # fmt: skip
