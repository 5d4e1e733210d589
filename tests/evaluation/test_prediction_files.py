"""A reference's predictions on disk: back as they were, and one line for files that are not theirs."""

import pytest
import torch
from safetensors.torch import save_file

from structprune.errors import UserError
from structprune.evaluation.fidelity import likeliest
from structprune.evaluation.prediction_files import FORMAT, PredictionFiles, noise_digest

NOISY = torch.tensor([[3, 2047, 5], [2047, 2047, 5]])  # (S, T)


@pytest.fixture
def files(tmp_path):
    return PredictionFiles(tmp_path)


@pytest.fixture
def kept():
    return likeliest(torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), top=5)


def test_back_as_they_were(files, kept):
    assert not files.has("0@ab")
    files.save("0@ab", kept, NOISY)
    again = files.load("0@ab", NOISY)
    assert files.has("0@ab") and again.vocabulary == 40
    for name in ("tokens", "log_p", "rest"):
        assert torch.equal(getattr(again, name), getattr(kept, name))


def test_digests_differ_with_ids_and_shape():
    assert noise_digest(NOISY) == noise_digest(NOISY.clone()) and len(noise_digest(NOISY)) == 16
    assert len({noise_digest(each) for each in (NOISY, NOISY + 1, NOISY.view(3, 2), NOISY[:1])}) == 4


def test_other_noise_is_refused(files, kept):
    files.save("0", kept, NOISY)
    with pytest.raises(UserError, match="0.safetensors' was made with other noise: give the evaluation.seed, noise"):
        files.load("0", NOISY.flip(0))


def test_a_missing_file_is_named(files):
    with pytest.raises(UserError, match="7.safetensors' is missing, to which predictions are compared: evaluate again"):
        files.load("7", NOISY)


def changed(**values):
    """The contents of a file that are not as written."""
    tensors = {"tokens": torch.zeros(3, 5, dtype=torch.int32), "log_p": -torch.ones(3, 5), "rest": -torch.ones(3)}
    return tensors | values


@pytest.mark.parametrize(
    "tensors, metadata",
    [
        (changed(tokens=torch.full((3, 5), 40, dtype=torch.int32)), {}),
        (changed(tokens=torch.full((3, 5), -1, dtype=torch.int32)), {}),
        (changed(tokens=torch.zeros(3, 5, dtype=torch.int64)), {}),
        (changed(log_p=-torch.ones(3, 4)), {}),
        (changed(log_p=torch.ones(3, 5)), {}),
        (changed(rest=torch.full((3,), torch.nan)), {}),
        (changed(rest=-torch.ones(2)), {}),
        ({"tokens": torch.zeros(3, 5, dtype=torch.int32)}, {}),
        (changed(), {"vocabulary": "many"}),
        (changed(), {"vocabulary": "4"}),
        (changed(), {"format": "another"}),
    ],
)
def test_damaged_files_are_one_line(files, tmp_path, tensors, metadata):
    (tmp_path / "predictions").mkdir()
    known = {"format": FORMAT, "noise": noise_digest(NOISY), "vocabulary": "40"}
    save_file(tensors, files.path("0"), metadata=known | metadata)
    with pytest.raises(UserError, match=r"^'.*0.safetensors' is damaged: evaluate again with --overwrite$"):
        files.load("0", NOISY)


def test_a_file_cut_short_is_damaged(files, kept):
    files.save("0", kept, NOISY)
    files.path("0").write_bytes(files.path("0").read_bytes()[:-9])
    with pytest.raises(UserError, match="0.safetensors' is damaged"):
        files.load("0", NOISY)
