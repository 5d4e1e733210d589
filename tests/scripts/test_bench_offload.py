"""Runs from disk beside runs that hold their weights: a real pair at a small size, arithmetic, and what is refused."""

import json

import pytest


@pytest.fixture
def bench(scripts, monkeypatch):
    module, shapes = scripts("bench_offload"), scripts("random_checkpoint")
    monkeypatch.setitem(module.SHAPES, "0.1B", shapes.LLaDAShape(32, 4, 2, 48, 100, 64))
    monkeypatch.setattr(module, "VOLUME", {"windows": 2, "held_out": 1, "window": 16, "levels": 2})
    return module


def row(way, seconds, peak, digest="same"):
    return {
        "size": "1B", "run": "wanda", "way": way, "seconds": seconds, "core_seconds": seconds / 2, "peak_bytes": peak,
        "digest": digest, "machine": {"processor": "a"},
    }  # fmt: skip


@pytest.mark.slow
def test_both_ways_of_a_run_write_the_same(bench, tmp_path):
    out = tmp_path / "x.json"
    arguments = ["--sizes", "0.1B", "--work", str(tmp_path / "work"), "--out", str(out)]
    assert bench.main([*arguments, "--runs", "sink-sparsegpt", "--ways", "disk"]) == 0
    assert bench.main([*arguments, "--runs", "sink-sparsegpt", "--ways", "held"]) == 0
    assert bench.main([*arguments, "--runs", "sink-sparsegpt", "--ways", "disk with parts"]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [each["way"] for each in result["rows"]] == ["held", "disk", "disk with parts"]  # the earlier row is kept
    assert len({each["digest"] for each in result["rows"]}) == 1
    pairs = [(each["way"], each["against"]) for each in result["compared"]]
    assert pairs == [("disk", "held"), ("disk with parts", "disk")]
    assert all(each["same"] and each["seconds_ratio"] > 0 for each in result["compared"])
    for each in result["rows"]:
        assert each["peak_bytes"] > 1e8 < each["predicted_bytes"] and each["core_seconds"] > 0
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["0.1B", "0.1B.safetensors"]


def test_ratios_are_of_the_same_size_and_run(bench):
    rows = [row("held", 10.0, 800), row("disk", 15.0, 200), row("disk", 3.0, 100) | {"size": "8B"}]
    (only,) = bench.compared(rows)
    assert (only["way"], only["against"]) == ("disk", "held")
    assert (only["seconds_ratio"], only["core_seconds_ratio"], only["peak_bytes_ratio"]) == (1.5, 1.5, 0.25)
    assert not bench.compared([rows[0], rows[1] | {"machine": {"processor": "b"}}])
    assert only["same"] and not bench.compared([rows[0], row("disk", 1.0, 1, "other")])[0]["same"]
    (only,) = bench.compared([rows[1], row("disk with parts", 18.0, 220)])
    assert (only["way"], only["against"], only["seconds_ratio"]) == ("disk with parts", "disk", 1.2)


def test_every_default_is_known(bench):
    assert bench.parse_names("--sizes", "0.1B,2 blocks of 8B", bench.SHAPES) == ["0.1B", "2 blocks of 8B"]
    assert bench.parse_names("--runs", ",".join(bench.RUNS), bench.RUNS) == [*bench.RUNS]


@pytest.mark.parametrize("option, value", [("--sizes", "2B"), ("--runs", "taylor"), ("--ways", "cloud")])
def test_unknown_names_are_refused(bench, option, value, tmp_path, capsys):
    assert bench.main([option, value, "--out", str(tmp_path / "x.json")]) == 2
    assert f"{option} '{value}': give " in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_rows_of_another_version_are_refused_before_anything_is_measured(bench, tmp_path, capsys):
    out = tmp_path / "x.json"
    out.write_text(json.dumps({"rows": [row("disk", 1.0, 1), {"size": "1B"}]}), encoding="utf-8")
    assert bench.main(["--sizes", "0.1B", "--work", str(tmp_path / "work"), "--out", str(out)]) == 2
    assert f"{out} has rows without a machine, of another version: give another --out" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
