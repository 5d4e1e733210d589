"""The folder of a training: whose it is, who works there, and what stays in it."""

import pytest

from structprune.errors import UserError
from structprune.recovery.folder import has_learnt, is_training, open_folder, opened_folder, training_folder
from structprune.runs.recover import recover


def test_a_checkpoint_that_a_kill_left_unfinished_was_not_learnt(whole_checkpoint, tmp_path):
    whole_checkpoint(tmp_path, "optimizer.pt")
    assert not has_learnt(tmp_path)
    whole_checkpoint(tmp_path)
    assert has_learnt(tmp_path)


def test_overwrite_forgets_another_training_and_nothing_else(whole_checkpoint, tmp_path):
    folder = training_folder(tmp_path / "out")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"is something else: move it, or choose another --out"):
            open_folder(tmp_path / "out", {"of": "this"}, overwrite)
    (folder / "thesis.txt").unlink()
    assert open_folder(tmp_path / "out", {"of": "that"}, False) == folder
    whole_checkpoint(folder)
    open_folder(tmp_path / "out", {"of": "that"}, False)
    assert (folder / "checkpoint-4").exists()  # the same training goes on
    for identity in ("that", "this"):
        whole_checkpoint(folder)
        open_folder(tmp_path / "out", {"of": identity}, True)
        assert [path.name for path in folder.iterdir()] == ["identity.json"]
    open_folder(tmp_path / "out", {"of": "another"}, False)  # nothing was learnt there


def test_a_file_that_a_logger_leaves_in_another_folder_is_not_ours(tmp_path):
    folder = training_folder(tmp_path / "out")
    folder.mkdir()
    (folder / "emissions.csv").write_text("mine")
    with pytest.raises(UserError, match=r"is something else"):
        open_folder(tmp_path / "out", {"of": "this"}, True)
    (folder / "identity.json").write_text("{}")
    assert is_training(folder)


def test_two_trainings_of_one_output_do_not_meet(pair, recover_config, tmp_path):
    dense, small = pair()
    out = tmp_path / "runs" / "out"
    with opened_folder(out, {"of": "this"}, False) as folder:
        before = sorted(folder.iterdir())
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"another training works in .*: wait for it, or choose another --out"):
                recover(str(small), str(dense), out, recover_config(), overwrite)
        assert sorted(folder.iterdir()) == before and not out.exists()
    recover(str(small), str(dense), out, recover_config())  # nothing was learnt there
    assert out.exists() and not folder.exists()


@pytest.mark.parametrize("learnt", [False, True])
def test_a_training_that_fails_leaves_what_it_learnt(whole_checkpoint, tmp_path, learnt):
    out = tmp_path / "runs" / "out"
    with pytest.raises(UserError, match="no memory"), opened_folder(out, {"of": "this"}, False) as folder:
        if learnt:
            whole_checkpoint(folder)
        raise UserError("no memory")
    assert folder.exists() == learnt and out.parent.exists() == learnt


def test_a_checkpoint_in_the_place_of_the_training_stays(pair, recover_config, tmp_path):
    dense, small = pair()
    place = small.rename(tmp_path / "out.training")
    with pytest.raises(UserError, match="input checkpoint"):
        recover(str(place), str(dense), tmp_path / "out", recover_config(), overwrite=True)
    assert (place / "config.json").exists()
