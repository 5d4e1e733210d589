"""Directories appear complete or not at all, readable by those who may read plainly written files."""

import os

import pytest

from structprune.checkpoint.atomic import whole_directory


def test_modes_are_those_of_plain_files(tmp_path):
    before = os.umask(0o022)
    try:
        with whole_directory(tmp_path / "made") as draft:
            (draft / "inside").mkdir()
            (draft / "inside" / "private").write_text("x")
            (draft / "inside" / "private").chmod(0o600)
    finally:
        os.umask(before)
    modes = [
        path.stat().st_mode & 0o777
        for path in (tmp_path / "made", tmp_path / "made/inside", tmp_path / "made/inside/private")
    ]
    assert modes == [0o755, 0o755, 0o644]


def test_what_was_there_stays_until_the_draft_is_complete(tmp_path):
    target = tmp_path / "made"
    with whole_directory(target) as draft:
        (draft / "one").write_text("1")
    with pytest.raises(RuntimeError, match="stop"), whole_directory(target) as draft:
        (draft / "two").write_text("2")
        assert [path.name for path in target.iterdir()] == ["one"]
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["made"] and [path.name for path in target.iterdir()] == [
        "one"
    ]
    with whole_directory(target) as draft:
        (draft / "two").write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["made"] and [path.name for path in target.iterdir()] == [
        "two"
    ]


def test_parents_that_were_made_go_again(tmp_path):
    with pytest.raises(RuntimeError), whole_directory(tmp_path / "a" / "b" / "made"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), whole_directory(tmp_path / "a" / "b" / "made"):
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    with whole_directory(tmp_path / "a" / "b" / "made"):
        pass
    assert (tmp_path / "a" / "b" / "made").is_dir()


@pytest.mark.parametrize("failures", [1, 2])
def test_nothing_is_lost_when_renames_fail(failures, tmp_path, monkeypatch):
    """The new directory cannot come in; then, with a second failure, the old one cannot go back either."""
    target = tmp_path / "made"
    with whole_directory(target) as draft:
        (draft / "one").write_text("1")
    rename, left = os.rename, list(range(failures))

    def failing(source, destination):
        if str(destination) == str(target) and left:
            left.pop()
            raise OSError("no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"), whole_directory(target) as draft:
        (draft / "two").write_text("2")
    result = [path for path in tmp_path.rglob("one")]
    assert len(result) == 1 and result[0].read_text() == "1"
    assert (result[0] == target / "one") is (failures == 1)


def test_a_link_is_replaced_and_its_directory_stays(tmp_path):
    real, link = tmp_path / "real", tmp_path / "made"
    real.mkdir()
    (real / "one").write_text("1")
    link.symlink_to(real)
    with whole_directory(link) as draft:
        (draft / "two").write_text("2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "real"] and not link.is_symlink()
    assert [path.name for path in link.iterdir()] == ["two"] and (real / "one").read_text() == "1"


def test_an_interrupt_after_the_swap_leaves_only_the_new_one(tmp_path, monkeypatch):
    target = tmp_path / "made"
    with whole_directory(target) as draft:
        (draft / "one").write_text("1")
    rename = os.rename

    def interrupted(source, destination):
        rename(source, destination)
        if str(destination) == str(target):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_directory(target) as draft:
        (draft / "two").write_text("2")
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "two"]
