"""calibration.safetensors: exact replay, and one line for every file that cannot be one."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from structprune.calibration.batches import Calibration, saved_sizes
from structprune.calibration.noise import level_times, noise_windows
from structprune.errors import UserError
from structprune.workers import Workers

MASK = 99


@pytest.fixture
def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (5, 12), generator=generator)
    noisy, p = noise_windows(ids, MASK, "uniform", generator, level_times(3, 1))
    metadata = {"mask_id": str(MASK), "source": "x.txt", "seed": "0", "noise_levels": "uniform x 3"}
    return Calibration(ids, noisy, p, metadata, held_out=2)


def stored(calibration: Calibration) -> dict[str, torch.Tensor]:
    return {name: getattr(calibration, name).clone() for name in ("input_ids", "noisy_ids", "mask_probability")}


def test_views_split_off_the_last_windows(calibration):
    assert (calibration.windows, calibration.levels, calibration.length) == (5, 3, 12)
    fit, check = calibration.fit, calibration.check
    assert (fit.windows, fit.held_out, check.windows, check.held_out) == (3, 0, 2, 2)
    for name, whole in stored(calibration).items():
        assert torch.equal(getattr(fit, name), whole[:3]) and torch.equal(getattr(check, name), whole[3:])
    assert fit.fit.windows == 3 and fit.check.windows == 0 and check.check.windows == 2


@pytest.mark.parametrize("probability", [True, False])
@pytest.mark.parametrize("view", ["whole", "fit", "check"])
def test_replay_is_exact(calibration, tmp_path, probability, view):
    if not probability:
        calibration = Calibration(calibration.input_ids, calibration.noisy_ids, None, calibration.metadata, 2)
    saved = calibration if view == "whole" else getattr(calibration, view)
    saved.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors", held_out=4)
    assert torch.equal(loaded.input_ids, saved.input_ids) and torch.equal(loaded.noisy_ids, saved.noisy_ids)
    assert (loaded.mask_probability is None) == (not probability)
    if probability:
        assert torch.equal(loaded.mask_probability, saved.mask_probability)
    assert loaded.held_out == saved.held_out  # the file's own, not the fallback
    assert loaded.metadata == calibration.metadata | {"held_out": str(saved.held_out)}


def test_the_file_has_the_documented_tensors_and_nothing_else_is_left(calibration, tmp_path):
    calibration.save(tmp_path / "calibration.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.safetensors"]
    with safe_open(tmp_path / "calibration.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["input_ids", "mask_probability", "noisy_ids"]
        assert file.metadata()["held_out"] == "2"


def test_a_failed_save_leaves_the_old_file(calibration, tmp_path, monkeypatch):
    path = tmp_path / "calibration.safetensors"
    path.write_bytes(b"old")

    def fail(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("structprune.models.tensor_files.save_file", fail)
    with pytest.raises(UserError, match=r"calibration.safetensors cannot be written \(No space left on device\)$"):
        calibration.save(path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot be written"):
        calibration.save(tmp_path / "missing" / "calibration.safetensors")


def test_held_out_falls_back_where_the_file_names_none(calibration, tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file(stored(calibration), path)
    assert Calibration.load(path).held_out == 0
    assert Calibration.load(path, held_out=4).check.windows == 4
    with pytest.raises(UserError, match="has 5 windows, of which 6 cannot be held out: lower calibration.held_out$"):
        Calibration.load(path, held_out=6)


def change(tensors, name, value):
    tensors[name] = value


def poke(tensors, name, position, value):
    tensors[name][position] = value


BAD = {
    "no noise": (lambda t: t.pop("noisy_ids"), r"has no tensor 'noisy_ids' \(N, S, T\): it is not a calibration file"),
    "no ids": (lambda t: t.pop("input_ids"), r"has no tensor 'input_ids' \(N, T\)"),
    "int32": (lambda t: change(t, "input_ids", t["input_ids"].int()), "input_ids is int32, not int64"),
    "half": (lambda t: change(t, "mask_probability", t["mask_probability"].half()), "is float16, not float32"),
    "flat": (lambda t: change(t, "noisy_ids", t["noisy_ids"][:, 0]), r"noisy_ids has shape \(5, 12\), not \(N, S, T\)"),
    "empty": (lambda t: change(t, "input_ids", t["input_ids"][:0]), r"input_ids has shape \(0, 12\)"),
    "length": (lambda t: change(t, "noisy_ids", t["noisy_ids"][..., :4]), r"shape \(5, 3, 4\), not \(5, 3, 12\)"),
    "levels": (lambda t: change(t, "mask_probability", t["mask_probability"][:, :2]), r"shape \(5, 2\), not \(5, 3\)"),
    "nan": (lambda t: poke(t, "mask_probability", (1, 2), float("nan")), r"holds nan, not a probability in \(0"),
    "zero": (lambda t: poke(t, "mask_probability", (0, 0), 0.0), "mask_probability holds 0.0"),
    "above": (lambda t: poke(t, "mask_probability", (0, 0), 1.5), "mask_probability holds 1.5"),
    "negative": (lambda t: poke(t, "input_ids", (0, 0), -3), "negative token id -3"),
    "two masks": (lambda t: poke(t, "noisy_ids", (4, 2, 5), 77), "by id 77, where only mask id 99 may"),
}


DEALT = {
    "other copies": (
        {"copies": "2", "steps": "50", "interval": "5"},
        "has 3 noisy copies .* say 2 of 10 noise",
    ),
    "more than levels": ({"copies": "3", "steps": "50", "interval": "25"}, "has 3 noisy copies .* say 3 of 2 noise"),
    "no levels": ({"copies": "3"}, "metadata 'steps' and 'interval' give no noise levels: calibrate anew from text$"),
    "interval 0": ({"copies": "3", "steps": "50", "interval": "0"}, "'steps' and 'interval' give no noise levels"),
    "too many": ({"copies": "3", "steps": "100001", "interval": "1"}, "'steps' and 'interval' give no noise levels"),
    "words": ({"copies": "few", "steps": "50", "interval": "5"}, "metadata 'copies' is 'few', not an integer"),
}


def test_a_file_without_noise_needs_no_mask_id(calibration, tmp_path):
    path, tensors = tmp_path / "calibration.safetensors", stored(calibration)
    save_file(tensors | {"noisy_ids": tensors["input_ids"][:, None].repeat(1, 3, 1)}, path)
    assert Calibration.load(path).levels == 3


def test_sizes_of_a_file(calibration, tmp_path):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    sizes = {"windows": 3, "held_out": 2, "length": 12, "copies": 3, "steps": 3, "interval": 1}
    assert saved_sizes(path, held_out=4) == sizes == calibration.sizes  # the file says 2
    dealt = {"copies": "3", "steps": "50", "interval": "5"}
    replace(calibration, metadata=calibration.metadata | dealt).save(path)
    assert saved_sizes(path, held_out=4) == sizes | {"steps": 50, "interval": 5}
    save_file(stored(calibration), path)
    assert saved_sizes(path, held_out=1) == sizes | {"windows": 4, "held_out": 1}
    with pytest.raises(UserError, match="5 windows and 5 are to be held out"):
        saved_sizes(path, held_out=5)
    save_file(stored(calibration) | {"noisy_ids": torch.zeros(2, 3)}, path)
    with pytest.raises(UserError, match=r"noisy_ids has shape \(2, 3\), not \(N, S, T\)"):
        saved_sizes(path, held_out=0)
    save_file(stored(calibration) | {"noisy_ids": torch.zeros(5, 3, 0)}, path)
    with pytest.raises(UserError, match="with all of them positive"):
        saved_sizes(path, held_out=0)
    with pytest.raises(UserError, match="no calibration file at"):
        saved_sizes(tmp_path / "none.safetensors", held_out=0)


@pytest.mark.parametrize("case", DEALT)
def test_what_copies_were_dealt_from_must_fit(calibration, tmp_path, case):
    metadata, message = DEALT[case]
    path = tmp_path / "bad.safetensors"
    replace(calibration, metadata=metadata).save(path)
    with pytest.raises(UserError, match=message):
        Calibration.load(path)
    replace(calibration, metadata={"copies": "3", "steps": "50", "interval": "5"}).save(path)
    assert Calibration.load(path).check_samples == 10 and calibration.check_samples == 3


@pytest.mark.parametrize("metadata", [{"mask_id": str(MASK)}, None], ids=["our file", "no metadata"])
@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_one_line(calibration, tmp_path, case, metadata):
    spoil, message = BAD[case]
    tensors = stored(calibration)
    spoil(tensors)
    path = tmp_path / "bad.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    with pytest.raises(UserError, match=message) as caught:
        Calibration.load(path)
    assert "\n" not in str(caught.value) and "bad.safetensors" in str(caught.value)


def test_another_models_noise_is_refused(calibration, tmp_path):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    assert Calibration.load(path, mask_id=MASK).windows == 5
    with pytest.raises(UserError, match="noised with mask id 99, but the model's is 98: calibrate anew from text$"):
        Calibration.load(path, mask_id=98)
    save_file(stored(calibration), path)  # without metadata the ids themselves tell
    with pytest.raises(UserError, match="differ from input_ids by id 99, where only mask id 98 may$"):
        Calibration.load(path, mask_id=98)


def test_unreadable_files(calibration, tmp_path):
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(UserError, match="no calibration file at"):
        Calibration.load(path)
    calibration.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as safetensors .*: calibrate anew from text$"):
        Calibration.load(path)
    save_file(stored(calibration), path, metadata={"held_out": "few"})
    with pytest.raises(UserError, match="metadata 'held_out' is 'few', not an integer of 64 bits"):
        Calibration.load(path)


@pytest.mark.parametrize("value", ["1e3", str(10**20), "9" * 5000, "\u0663", ""])
def test_metadata_that_are_no_integers_of_64_bits(calibration, tmp_path, value):
    path = tmp_path / "calibration.safetensors"
    replace(calibration, metadata={"mask_id": value}).save(path)
    with pytest.raises(UserError, match="metadata 'mask_id' is .*, not an integer of 64 bits") as caught:
        Calibration.load(path)
    assert len(str(caught.value)) < 300


def test_processes_share_fit_and_held_out_windows(calibration):
    parts = [calibration.share(Workers(rank, 2)) for rank in range(2)]
    assert [(part.windows, part.held_out) for part in parts] == [(2, 1), (3, 1)]
    for name in ("input_ids", "noisy_ids", "mask_probability"):
        fit, check = (torch.cat([getattr(getattr(part, side), name) for part in parts]) for side in ("fit", "check"))
        assert torch.equal(torch.cat((fit, check)), getattr(calibration, name))
    assert calibration.share(Workers()) is calibration
