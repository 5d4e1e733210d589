"""scripts/gpu_report.py, all stages at a tiny size on the CPU."""

import importlib
import json
from pathlib import Path

import pytest

TINY = [
    "--shape", "tiny", "--device", "cpu", "--batches", "1,2", "--lengths", "32,64", "--windows", "3", "--held-out", "2",
    "--window", "16", "--levels", "2", "--rounds", "2", "--gen-length", "8", "--steps", "4",
]  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return importlib.import_module("gpu_report")


def test_every_stage_writes_its_file(script, tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "out"
    places = ["--work", str(work), "--out", str(out)]
    assert script.main([*TINY, *places, "--stages", "make,prune,forward"]) == 0
    assert script.main([*TINY, *places, "--stages", "generation,nm,widths,mass"]) == 0  # a later call goes on
    assert {path.name for path in out.iterdir()} == {f"gpu_tiny_{name}.json" for name in script.STAGES}
    found = {name: json.loads((out / f"gpu_tiny_{name}.json").read_text()) for name in script.STAGES}
    assert all(each["weights"] == "random" and each["machine"]["torch"] for each in found.values())
    assert [run["asked"] for run in found["prune"]["runs"]] == [0.3, 0.5]
    sizes = [(row["batch"], row["length"]) for row in found["forward"]["forward"][::3]]
    assert sizes == [(1, 32), (1, 64), (2, 32), (2, 64)] and found["forward"]["generation"] == []
    assert {(row["batch"], row["length"], row["cache"]) for row in found["generation"]["generation"]} == {
        (batch, 32, cache) for batch in (1, 2) for cache in ("none", "prefix")
    }  # one block of 8
    assert found["nm"]["semi_structured"]["refused"] == "torch has no 2:4 kernels for device cpu"
    masses = found["mass"]["rows"]
    assert [(row["batch"], row["length"]) for row in masses] == [(1, 32), (1, 64), (2, 32), (2, 64)]
    assert all(row["largest_difference"] < 1e-3 and min(row["median_ms"].values()) > 0 for row in masses)
    assert "costs" in found["widths"] and found["make"]["bytes"] > 0


def test_no_stage_starts_too_late(script, tmp_path, capsys):
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert script.main([*TINY, *places, "--seconds", "0"]) == 0
    assert "run --stages mass on its own" in capsys.readouterr().out and not list((tmp_path / "out").iterdir())


def test_what_cannot_be_run(script, tmp_path, capsys):
    for more, message in (
        (["--stages", "forwards"], "unknown stage 'forwards' (did you mean 'forward'?)"),
        (["--stages", "forward"], "is not there: run --stages make,prune first"),
        (["--lengths", "512;64"], "--lengths '512;64' is no list of numbers"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ):
        assert script.main([*TINY, "--work", str(tmp_path), "--out", str(tmp_path), *more]) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.strip().splitlines()) == 1
