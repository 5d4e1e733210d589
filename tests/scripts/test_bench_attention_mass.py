"""scripts/bench/bench_attention_mass.py on tiny lengths."""

import json
import math
from argparse import Namespace

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture
def script(scripts):
    return scripts("bench_attention_mass")


def test_naive_mass_by_hand(script):
    """Two positions, D = 1: scores 0 for query 0; 0 and ln 3 for query 1, so weights (1/2, 1/2) and (1/4, 3/4)."""
    query, key = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1), torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    assert torch.allclose(script.naive_mass(query, key), torch.tensor([[0.75, 1.25]]))


def test_peak_is_of_the_full_length_alone(script, monkeypatch):
    size = 64 * 2**20

    def hold(query, key):  # eight times as much in the warm-up
        torch.ones(size if query.shape[2] == 2000 else 8 * size, dtype=torch.uint8)

    monkeypatch.setitem(script.METHODS, "naive", hold)
    options = Namespace(heads=1, size=2, device=torch.device("cpu"))
    assert script.run_case("naive", 2000, options) == pytest.approx(size, rel=0.15)


def test_a_peak_that_cannot_be_known_is_left_open(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "memory_case", lambda *case: None)
    out = tmp_path / "mass.json"
    assert script.main(["--lengths", "64", "--heads", "1", "--size", "4", "--rounds", "1", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["peak_bytes"] == {"naive": None, "tiled": None} and row["memory_ratio"] is None
    assert capsys.readouterr().out.count("?") == 3


def test_a_run_writes_figures_and_machine(script, tmp_path, capsys):
    threads, out = torch.get_num_threads(), tmp_path / "made" / "mass.json"
    options = ["--lengths", "1024", "--heads", "8", "--size", "4", "--rounds", "2", "--threads", "1"]
    try:
        assert script.main([*options, "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "1,024" in printed and str(out) in printed.replace("\n", "")
    result = json.loads(out.read_text())
    assert result["settings"] | {"rounds": 2, "heads": 8, "head_dim": 4, "device": "cpu"} == result["settings"]
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["threads"] == 1
    (row,) = result["rows"]
    assert row["length"] == 1024
    assert row["peak_bytes"]["naive"] > 60e6 and row["peak_bytes"]["tiled"] < 15e6  # 2 x 8 x 1024² x 4, and 2 tiles
    assert row["max_relative_difference"] < 1e-5
    assert set(row["median_ms"]) == {"naive", "tiled", "block", "block with mass"}
    assert row["time_ratio"]["p25"] <= row["time_ratio"]["median"] <= row["time_ratio"]["p75"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lengths", "256,x"), "256,x"),
        (("--lengths", "0"), "--lengths has 0"),
        (("--size", "3"), "--size = 3"),
        (("--rounds", "0"), "--rounds = 0"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_errors_are_one_line(script, capsys, options, words):
    assert script.main(list(options)) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
