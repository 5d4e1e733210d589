"""Packed masks in other environments: the cases that are written, and what counts as right of each outcome."""

import json

import pytest
import torch
from safetensors.torch import load_file

from structprune.checkpoint.bitmask import in_pairs
from structprune.masking.masks import Masks

OLD = {"transformers": "4.55.4", "compressed-tensors": "0.14.0.1"}
NEW = {"transformers": "5.24.0", "compressed-tensors": "0.20.1"}
CASE = {"name": "a", "layout": "sparse-bitmask", "dtype": "bfloat16", "plain_bytes": 4, "written_bytes": 3}
READ = {"tensors_that_differ": 0, "logits": 0.0, "saved_again": "the same"}


@pytest.fixture
def check(scripts):
    return scripts("check_packed")


@pytest.mark.parametrize("versions, result, good", [
    (OLD, READ, True),
    (OLD, READ | {"tensors_that_differ": 1}, False),
    (OLD, READ | {"logits": 1e-6}, False),
    (OLD, {"refused": "sparse-bitmask"}, False),
    (OLD, {"error": "KeyError: 1"}, False),
    (NEW, {"refused": "weights packed as sparse-bitmask are not read"}, True),
    (NEW, {"refused": "weights packed as sparse-bitmask\nare not read"}, False),
    (NEW, {"refused": "No module named compressed_tensors"}, False),
    (NEW, READ, False),  # by chance, as nothing says that it unpacks
    (OLD | {"transformers": "4.57.6"}, {"refused": "sparse-bitmask"}, True),
    (OLD | {"compressed-tensors": "0.15.0"}, {"refused": "sparse-bitmask"}, True),
])  # fmt: skip
def test_what_is_right(check, versions, result, good):
    row = check.outcome(CASE, result, versions)
    assert row["good"] is good and row["versions"] == versions and row["case"] == "a"


def test_masks_that_are_written(check, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("dream")
    for pattern, pairs in (("2of4", True), ("half", False)):
        directory = check.write_masked(source, tmp_path / pattern, pattern)
        masks, state = Masks.load(directory / "masks.safetensors"), load_file(directory / "model.safetensors")
        assert len(masks.shapes) == 21 and masks.sparsity() == 0.5
        for name in masks.shapes:
            keep = masks.kept(name)  # (O, C)
            assert in_pairs(keep) == pairs and torch.equal(state[name] != 0, keep), name


def test_rows_and_exit_code(check, tmp_path, monkeypatch, capsys):
    made, asked = tmp_path / "packed.json", []
    monkeypatch.setattr(check, "make_cases", lambda work: [CASE])
    monkeypatch.setattr(check, "environment", lambda envs, *releases: asked.append((envs, releases)) or "python")
    results = {"versions": OLD, "cases": {"a": READ}}
    monkeypatch.setattr(check, "run_check", lambda python, cases, work, check: results)
    command = ["--releases", "4.55.4+0.14.0.1", "--work", str(tmp_path), "--out", str(made)]
    assert check.main(command) == 0
    assert asked == [(tmp_path, ("4.55.4", {"compressed-tensors": "0.14.0.1"}))]
    (row,) = json.loads(made.read_text())["rows"]
    kept = {key: CASE[key] for key in CASE if key != "name"}
    assert row == {"case": "a", **kept, "versions": OLD, "good": True, **READ}
    results |= {"versions": {}, "cases": {"a": {"error": "no torch"}}}
    assert check.main(command) == 1 and "no torch" in capsys.readouterr().out


def test_releases_that_are_none(check, tmp_path, capsys):
    out = ["--out", str(tmp_path / "x.json")]
    for text in ("4.55.4", "4.55.4+", "4.55.4+0.14.0.1,+"):
        assert check.main(["--releases", text, *out]) == 2
        assert "give pairs such as 4.55.4+0.14.0.1" in capsys.readouterr().err
