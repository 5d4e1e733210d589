"""The cost of keeping finished parts, on runs of a moment."""

import json

import pytest


@pytest.fixture
def bench(scripts, monkeypatch):
    module = scripts("bench_work")
    small = {"windows": 4, "copies": 1, "length": 32, "held_out": 4, "batch": 4}
    monkeypatch.setattr(module, "BASE", {f"calibration.{key}": value for key, value in small.items()})
    few = {"structured.split_candidates": 2, "structured.split_windows": 2}
    monkeypatch.setitem(module.RUNS, "structured, 0.5", few)
    return module


@pytest.mark.slow
def test_ways_take_turns_and_ratios_are_of_their_medians(bench, tmp_path):
    out = tmp_path / "x.json"
    assert bench.main(["--rounds", "1", "--out", str(out)]) == 0
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert set(runs) == {"structured, 0.5", "masks, 0.5"}
    for row in runs.values():
        times = {way: values[0] for way, values in row["seconds"].items()}
        assert row["ratio"]["keeping"] == times["keeping"] / times["without"]
        assert row["ratio"]["kept before"] < 1 and row["bytes"] > 1e5


def test_no_rounds_are_refused(bench, tmp_path, capsys):
    assert bench.main(["--rounds", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert "--rounds = 0: give at least 1" in capsys.readouterr().err and not list(tmp_path.iterdir())
