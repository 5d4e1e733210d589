"""What a run would calibrate on is looked at before any weight is read, whatever the method."""

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.cli.main import main


@pytest.fixture(params=["structured", "unstructured", "nm"])
def refused(request, monkeypatch, tmp_path, capsys):
    """`refused(checkpoint, source, *more)` -> the one line of a refusal, with exit code 2 and nothing written."""
    monkeypatch.setattr("structprune.models.loading._read_shard", lambda path: pytest.fail("weights were read"))

    def run(checkpoint, source, *more) -> str:
        given = ["--out", str(tmp_path / "out"), "--calibration", str(source), "--method", request.param, *more]
        assert main(["prune", str(checkpoint), *given]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "out").exists() and sum(line.startswith("structprune: error: ") for line in lines) == 1
        return lines[-1]

    return run


def test_text_without_a_tokenizer(refused, tiny_checkpoint, text_path):
    line = refused(tiny_checkpoint(tokenizer=False), text_path, "--set", "calibration.length=16")
    assert "no tokenizer that can be read" in line


def test_another_number_held_out_than_a_replay_has(refused, tiny_checkpoint, tmp_path):
    ids, saved = torch.arange(80).view(5, 16), tmp_path / "saved.safetensors"  # (N, T)
    Calibration(ids, ids[:, None].clone(), None, {"mask_id": "2047"}, held_out=2).save(saved)
    line = refused(tiny_checkpoint(tokenizer=False), saved, "--set", "calibration.held_out=3")
    assert "calibration.held_out = 3 has no effect" in line and "with 2 windows held out" in line


def test_a_replay_that_is_not_there(refused, tiny_checkpoint, tmp_path):
    line = refused(tiny_checkpoint(tokenizer=False), tmp_path / "gone.safetensors")
    assert "no calibration file at" in line
