"""What a run that prunes and trains back refuses before it writes, and what it takes over from the pruning."""

import pytest

from structprune.config import Config
from structprune.errors import UserError
from structprune.runs import gradual as module
from structprune.runs.gradual import prune_and_recover
from structprune.runs.schedule import Schedule, relative_ratio
from structprune.runs.stages import pruned_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_something_else_beside_the_output_stays(tiny_checkpoint, schedule, tmp_path):
    folder = pruned_folder(tmp_path / "out")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"where the pruned model would be kept, is something else: move it"):
            prune_and_recover(str(tiny_checkpoint()), tmp_path / "out", schedule(0.5), overwrite)
    assert names(folder) == ["thesis.txt"]
    cached = schedule(0.5, recovery={"teacher__cache": str(tmp_path / "new.pruned" / "cache")})
    with pytest.raises(UserError, match=r"cache lies in '.*new.pruned': give it another place"):
        prune_and_recover(str(tiny_checkpoint()), tmp_path / "new", cached)
    place = tiny_checkpoint(name="new.pruned")
    with pytest.raises(UserError, match="lies inside the input checkpoint"):
        prune_and_recover(str(place), tmp_path / "new", schedule(0.5), True)


@pytest.mark.parametrize("folder", ["out.pruned", "out.training"])
def test_levels_do_not_lie_in_what_is_removed(tiny_checkpoint, schedule, tmp_path, folder):
    """Folders that are beside the output only until it is written."""
    asked = schedule(0.5, levels=tmp_path / folder / "levels", search__enabled=True, reconstruct__enabled=True)
    with pytest.raises(UserError, match=f"{folder}' lie in each other: give them places of their own"):
        prune_and_recover(str(tiny_checkpoint()), tmp_path / "out", asked)
    assert names(tmp_path) == ["llada-tiny", "text.txt"]


@pytest.mark.parametrize(
    "ratios, changes, reason",
    [
        ((0.5,), {"gradual": True}, "goes through several ratios, such as --ratio 0.3,0.5: give them, or leave out"),
        ((0.0, 0.5), {"gradual": True}, "leave out ratio 0"),
        ((0.5, 0.5), {}, "ratios 0.5, 0.5 have one twice: give each once"),
        ((0.3, 0.5), {"gradual": True, "structured__split": 2}, "structured.split = 2 would take as many heads"),
        ((0.3, 0.5), {"gradual": True, "method": "unstructured"}, "removes heads and channels: leave out --gradual"),
        ((0.3, 0.5), {"method": "unstructured"}, "method = unstructured takes one ratio at a time"),
        ((0.3, 0.5), {"gradual": True, "steps": 1}, r"of train.batch x data.length = 128 tokens: raise it to 256"),
        (
            (0.3, 0.5),
            {"gradual": True, "recovery": {"blocks__tokens": 256}},
            "blocks.tokens = 256 is a first stage of one training, .*: leave out --gradual or blocks.tokens",
        ),
        ((0.5,), {"recovery": {"data__length": 65}}, "data.length = 65 exceeds the 64 positions"),
        ((0.5,), {"recovery": {"train__batch": 10}}, "make it a multiple of 4"),
        ((0.999,), {}, "no plan meets ratio 0.9990"),
        ((0.3, 0.99), {"gradual": True}, "no plan meets ratio"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tiny_checkpoint, schedule, tmp_path, monkeypatch, ratios, changes, reason
):
    monkeypatch.setattr(module, "prune_at_ratios", None)
    with pytest.raises(UserError, match=reason):
        prune_and_recover(str(tiny_checkpoint()), tmp_path / "out", schedule(*ratios, **changes))
    assert names(tmp_path) == ["llada-tiny", "text.txt"]


def test_levels_and_a_saved_calibration_are_refused(schedule, tmp_path):
    with pytest.raises(UserError, match="every ratio of a gradual schedule prunes another: leave out --levels"):
        schedule(0.3, 0.5, gradual=True, levels=tmp_path).completed()
    config = Config.load(overrides={"calibration.source": "old/calibration.safetensors"})
    with pytest.raises(UserError, match=r"has no text to train on: .*--recover-set data.source=notes.txt"):
        Schedule(config).completed()
    assert schedule(0.3).completed().recovery == schedule(0.3).recovery  # whose text is its own


def test_the_training_takes_over_what_it_does_not_name():
    values = {"calibration.source": "c4", "calibration.split": "validation", "model.device": "cpu", "model.mask_id": 7}
    recovery = Schedule(Config.load(overrides=values)).completed().recovery
    assert (recovery.data.source, recovery.data.split) == ("c4", "validation")
    assert (recovery.model.device, recovery.model.mask_id, recovery.model.allow_pickle) == ("cpu", 7, False)


def test_ratios_are_counted_against_the_dense_model():
    assert relative_ratio(0.5, 0.3) == pytest.approx(0.2 / 0.7)
    assert (1 - 0.31) * (1 - relative_ratio(0.7, 0.31)) == pytest.approx(0.3)
    assert relative_ratio(0.3, 0.32) == 0  # units are whole
