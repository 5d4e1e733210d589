"""Files are written whole or not at all."""

import pytest

from structprune.files import first_line, is_draft, whole_file, write_whole


def test_first_line():
    assert first_line(OSError(" one\ntwo")) == "one" and first_line(KeyError()) == "KeyError"


def test_content_and_folders_are_written(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "b.json"
    path.write_bytes(b"one")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as draft:
        draft.write_bytes(b"tw")
        assert is_draft(draft) and not is_draft(path) and draft.parent == path.parent
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "b.json"
    with whole_file(path) as one, whole_file(path) as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]
