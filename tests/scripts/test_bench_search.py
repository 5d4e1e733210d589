"""The benchmark of a search against its dry run, on a tiny model."""

import json

import pytest

SMALL = {
    "calibration.windows": 6, "calibration.held_out": 2, "calibration.batch": 2, "calibration.copies": 2,
    "calibration.length": 24, "search.sequences": 4, "search.rounds": 1,
}  # fmt: skip


@pytest.fixture
def bench(scripts):
    return scripts("bench_search")


def arguments(checkpoint, text, out, **changes):
    keys = SMALL | changes
    options = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    return ["--checkpoint", str(checkpoint), "--name", "tiny", "--text", str(text), "--out", str(out), *options]


@pytest.mark.slow
def test_every_prediction_stands_beside_what_was_measured(bench, tiny_checkpoint, text_path, tmp_path, capsys):
    out = tmp_path / "search_cost.json"
    assert bench.main(arguments(tiny_checkpoint("llada"), text_path, out)) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["seconds"]) == {"levels", "search", "refit"} and result["rate"] > 1e8
    for row in result["seconds"].values():
        assert row["predicted"] == pytest.approx(row["operations"] / result["rate"])
        assert 0 < row["measured"] < result["run_seconds"]
    assert 0.2 < result["disk"]["measured"] / result["disk"]["predicted"] < 20  # files have headers
    assert result["peak_bytes"]["measured"] > 1e8
    assert str(tmp_path) not in out.read_text(encoding="utf-8")  # names of files, no places
    printed = capsys.readouterr().out
    assert "levels on disk" in printed and printed.count("x │") == 5


def test_a_run_that_is_refused_is_one_line_and_writes_nothing(bench, tiny_checkpoint, text_path, tmp_path, capsys):
    out = tmp_path / "search_cost.json"
    command = arguments(tiny_checkpoint("llada"), text_path, out, **{"search.rounds": 0})
    assert bench.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bench_search: error:" in error and "search.rounds = 0" in error
    assert not out.exists()
