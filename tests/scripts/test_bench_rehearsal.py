"""How soon rehearsals are over: real ones at a tiny size, which leave nothing, and what is refused."""

import json

import pytest


@pytest.fixture
def bench(scripts, monkeypatch):
    module, shapes = scripts("bench_rehearsal"), scripts("random_checkpoint")
    monkeypatch.setitem(module.SHAPES, "0.1B", shapes.LLaDAShape(32, 4, 2, 48, 100, 64))
    return module


@pytest.mark.slow
def test_a_run_ends_where_the_long_work_would_begin(bench, tmp_path):
    out, work = tmp_path / "x.json", tmp_path / "work"
    runs = ["structured", "sparsegpt"]
    arguments = ["--size", "0.1B", "--runs", ",".join(runs), "--threads", "2", "--work", str(work), "--out", str(out)]
    assert bench.main(arguments) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["size"] == "0.1B" and result["machine"]["threads"] == 2
    assert [row["run"] for row in result["rows"]] == runs
    for row in result["rows"]:
        assert row["until_over"]["seconds"] > row["rehearsal"]["seconds"] > 0
        assert row["until_over"]["core_seconds"] > row["rehearsal"]["core_seconds"] > 0
    assert sorted(path.name for path in work.iterdir()) == ["0.1B", "0.1B.safetensors"]


def test_runs_that_read_no_text_have_nothing_to_rehearse(bench, tmp_path, capsys):
    name = "magnitude without a check"
    assert name not in bench.REHEARSED
    assert bench.main(["--runs", name, "--out", str(tmp_path / "x.json")]) == 2
    assert f"--runs '{name}': give structured" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_needs_a_thread(bench, tmp_path, capsys):
    assert bench.main(["--threads", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert "--threads = 0: give at least 1" in capsys.readouterr().err and not list(tmp_path.iterdir())
