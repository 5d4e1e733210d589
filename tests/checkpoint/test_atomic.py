"""Directories appear complete or not at all, readable by those who may read plainly written files."""

import os
import re
import signal
from pathlib import Path

import pytest

from structprune.checkpoint import atomic, swap
from structprune.checkpoint.atomic import output_place, whole_directory
from structprune.checkpoint.drafts import Draft, clean_up, new_draft
from structprune.errors import Interrupted, UserError

MARKS = ("one", "two")
BY_RENAMES = "by renames"


@pytest.fixture(params=["at once", BY_RENAMES])
def way(request, monkeypatch) -> str:
    """How directories are exchanged: by the system in one step, or as on file systems that cannot."""
    if request.param == BY_RENAMES:
        monkeypatch.setattr(swap, "_rename_at_once", lambda *arguments, **options: False)
    return request.param


def write(directory: Path, name: str, replaces: tuple[str, ...] = MARKS) -> None:
    """An output of one file."""
    with whole_directory(directory, replaces) as draft:
        (draft / name).write_text(name)


def tree(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


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


def test_what_was_there_stays_until_the_draft_is_complete(way, tmp_path):
    target = tmp_path / "made"
    write(target, "one")
    with pytest.raises(RuntimeError, match="stop"), whole_directory(target, MARKS) as draft:
        (draft / "two").write_text("2")
        assert tree(target) == ["one"]
        raise RuntimeError("stop")
    assert tree(tmp_path) == ["made", "made/one"]
    write(target, "two")
    assert tree(tmp_path) == ["made", "made/two"]


def test_parents_that_were_made_go_again(tmp_path):
    with pytest.raises(RuntimeError), whole_directory(tmp_path / "a" / "b" / "made"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), whole_directory(tmp_path / "a" / "b" / "made"):
        raise RuntimeError
    assert tree(tmp_path) == ["a"]
    with whole_directory(tmp_path / "a" / "b" / "made"):
        pass
    assert (tmp_path / "a" / "b" / "made").is_dir()


@pytest.mark.parametrize("replaces", [(), MARKS])
@pytest.mark.parametrize("name", ["letter", None, "file"])
def test_what_appears_meanwhile_stays_and_the_run_is_kept(way, name, replaces, tmp_path):
    """A directory that holds something, an empty one, and a file."""
    target = tmp_path / "made"
    (tmp_path / "made.new").write_text("of somebody else")
    with pytest.raises(UserError) as result, whole_directory(target, replaces) as draft:
        (draft / "one").write_text("1")
        if name == "file":
            target.write_text("file")
        else:
            target.mkdir()
            if name:
                (target / name).write_text("dear")
    before = {"letter": ["made", "made/letter"], None: ["made"], "file": ["made"]}[name]
    assert tree(tmp_path) == sorted([*before, "made.new", "made.new2", "made.new2/one"])
    said = f"output '{target}' came to hold something else meanwhile: the finished run is kept in '{target}.new2'"
    assert str(result.value).startswith(said)


def test_only_what_was_there_at_the_start_is_replaced(way, tmp_path):
    """Another run's output, and one that lost its mark."""
    target = tmp_path / "made"
    write(target, "one")
    with pytest.raises(UserError, match="made.new'"), whole_directory(target, MARKS) as draft:
        (draft / "two").write_text("2")
        write(target, "one")
    assert tree(tmp_path) == ["made", "made.new", "made.new/two", "made/one"]
    with pytest.raises(UserError, match="made.new2'"), whole_directory(target, MARKS) as draft:
        (draft / "two").write_text("2")
        (target / "one").rename(target / "letter")
    assert (target / "letter").read_text() == "one"


def test_a_run_that_is_faster_by_a_moment_wins(way, tmp_path, monkeypatch):
    """It replaces the output between the other one's last look and its exchange."""
    target, looked = tmp_path / "made", []
    write(target, "one")

    def look(directory, replaces):
        if not looked:
            looked.append(directory)
            write(target, "one")
            (target / "mark").write_text("faster")
        return True

    monkeypatch.setattr(atomic, "may_replace", look)
    with pytest.raises(UserError, match="made.new'"):
        write(target, "two")
    assert tree(tmp_path) == ["made", "made.new", "made.new/two", "made/mark", "made/one"]


def test_an_output_that_goes_away_meanwhile_is_no_obstacle(way, tmp_path):
    target = tmp_path / "made"
    write(target, "one")
    with whole_directory(target, MARKS) as draft:
        (draft / "two").write_text("2")
        target.rename(tmp_path / "elsewhere")
    assert tree(tmp_path) == ["elsewhere", "elsewhere/one", "made", "made/two"]


@pytest.mark.parametrize("failures", [1, 9])
def test_nothing_is_lost_when_renames_fail(failures, tmp_path, monkeypatch):
    """The new directory cannot come in; then the old one cannot go back either until the next run."""
    target = tmp_path / "made"
    monkeypatch.setattr(swap, "_rename_at_once", lambda *arguments, **options: False)
    write(target, "one")
    rename, left = os.rename, list(range(failures))

    def failing(source, destination):
        if str(destination) == str(target) and left:
            left.pop()
            raise OSError(5, "no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises((OSError, UserError), match="no"):
        write(target, "two")
    if failures == 1:
        assert tree(tmp_path) == ["made", "made.new", "made.new/two", "made/one"]
        return
    assert not target.exists() and [path.read_text() for path in tmp_path.rglob("one")] == ["one"]
    left.clear()
    clean_up(target)
    assert (target / "one").read_text() == "one" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("holds", ["one", None])
def test_a_link_stays_and_its_directory_is_written(way, holds, tmp_path):
    """Such as one to another disk."""
    real, link = tmp_path / "real", tmp_path / "made"
    real.mkdir()
    if holds:
        (real / holds).write_text("1")
    link.symlink_to(real)
    write(link, "two", MARKS if holds else ())
    assert link.is_symlink() and (link / "two").exists() and not (link / "one").exists() and (real / "two").exists()


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "made").symlink_to(tmp_path / "made")
    with pytest.raises(UserError, match="made' is a loop of links: choose another"):
        output_place(tmp_path / "made")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_until_the_last_step_is_done(way, before, number, tmp_path, monkeypatch):
    target, handler = tmp_path / "made", signal.getsignal(number)
    write(target, "one")

    def signalled(action):
        def act(*arguments, **options):
            if before:
                os.kill(os.getpid(), number)
            action(*arguments, **options)
            os.kill(os.getpid(), number)

        return act

    monkeypatch.setattr(atomic, "exchange", signalled(atomic.exchange))
    signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted, match="made' was complete by then"):
            write(target, "two")
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, handler)
    assert tree(tmp_path) == ["made", "made/two"]


def test_a_signal_while_a_draft_is_removed_waits(tmp_path, monkeypatch):
    removed, handler = [], signal.getsignal(signal.SIGINT)
    settle = Draft.settle

    def signalled(draft):
        os.kill(os.getpid(), signal.SIGINT)
        settle(draft)
        removed.append(draft.path)

    monkeypatch.setattr(Draft, "settle", signalled)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "made"):
            raise RuntimeError
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(removed) == 1 and not list(tmp_path.iterdir())


def test_an_interrupt_within_an_output_of_parts_speaks_of_none_of_them(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "made"):
        raise Interrupted("a part was complete by then")
    assert not list(tmp_path.iterdir())


def test_drafts_of_living_runs_stay_and_those_of_killed_ones_go(tmp_path):
    target, child = tmp_path / "made", os.fork()
    if child == 0:
        with new_draft(target, tmp_path) as draft:
            (draft.path / "one").write_text("1")
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with new_draft(tmp_path / "mad", tmp_path) as other, new_draft(target, tmp_path) as draft:
        assert len(list(tmp_path.glob(".made.*.draft"))) == 2
        (tmp_path / ".made.notes").write_text("of somebody else")
        clean_up(target)
        assert list(tmp_path.glob(".made.*.draft")) == [draft.path] and other.path.exists()
    assert tree(tmp_path) == [".made.notes"]


def test_an_output_made_by_hand_after_a_kill_costs_nobody_anything(tmp_path):
    """Neither the one made by hand nor the one that the killed run was replacing."""
    target, child = tmp_path / "made", os.fork()
    if child == 0:
        with new_draft(target, tmp_path) as draft:
            draft.old.mkdir()
            (draft.old / "one").write_text("1")
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    target.mkdir()
    clean_up(target)
    assert target.is_dir() and [path.read_text() for path in tmp_path.rglob("one")] == ["1"]


@pytest.mark.parametrize("entry", [None, "letter"])
def test_the_current_directory_is_filled_not_replaced(way, entry, tmp_path, monkeypatch):
    """Its inode stays, so that whoever stands in it sees the output."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    inode = place.stat().st_ino
    with pytest.raises(UserError, match="kept in '.*/here/here.new'") if entry else whole_directory(".") as draft:
        if entry:
            with whole_directory(".") as draft:
                (draft / "one").write_text("1")
                (place / entry).write_text("dear")
        else:
            (draft / "sub").mkdir()
            (draft / "sub" / "one").write_text("1")
            (draft / "config.json").write_text("{}")
    expected = ["here.new", "here.new/one", "letter"] if entry else ["config.json", "sub", "sub/one"]
    assert tree(Path(".")) == expected and place.stat().st_ino == inode


def test_names_that_are_no_names(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for path in ("../b/../made", tmp_path / "a" / ".." / "made", "../made/x/.."):
        assert atomic.output_place(path) == tmp_path / "made"
    assert atomic.output_place("..") == tmp_path and atomic.output_place(".") == tmp_path / "a"


def test_mount_points_are_known_by_the_table_too(tmp_path, monkeypatch):
    table = tmp_path / "mountinfo"
    place = tmp_path / "with space"
    place.mkdir()
    table.write_text(f"36 35 98:0 / {str(place).replace(' ', chr(92) + '040')} rw,noatime - ext4 /dev/root rw\n")
    assert not atomic.is_fixed(place)
    monkeypatch.setattr(atomic, "MOUNTS", table)
    assert atomic.is_fixed(place) and not atomic.is_fixed(tmp_path)
    assert re.fullmatch(r".*with space", atomic._mount_points()[0])
