"""The benchmark of quantised models: a form that needs no library, and what is said of those that are missing."""

import sys

import pytest

from structprune import load_model, save_pruned
from structprune.assets import model_directory
from structprune.runs.demo import HeldOut


@pytest.fixture
def bench(scripts):
    return scripts("bench_quantised")


@pytest.mark.slow
def test_a_checkpoint_is_saved_loaded_again_and_judged(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = load_model(model_directory(), device="cpu")
    dense, held_out = save_pruned(model, tmp_path / "dense"), HeldOut(model, 1, 4, 32)
    row = bench.measure(dense, "bf16", held_out, tmp_path)
    assert row["reload_difference"] == 0 and row["bytes"] == (dense / "model.safetensors").stat().st_size
    assert abs(row["loss"]["mean"]) < 0.05 and row["loss"]["standard_error"] > 0
    for name in bench.LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    row = bench.measure(dense, "torchao int8 weights", held_out, tmp_path)
    assert "torchao" in row["refused"] and "loss" not in row
    assert "torchao int8 weights" in list(bench.table_of([row]).columns[1]._cells)


def test_without_either_library(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "versions", lambda: dict.fromkeys(bench.LIBRARIES))
    assert bench.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "neither torchao nor bitsandbytes is installed: pip install" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torchao int8 weights", "torchao int4 weights, groups of 32"])
def test_weights_of_eight_and_four_bits(bench, tmp_path, monkeypatch, form):
    """Where torchao is installed, which the tests do not ask for."""
    pytest.importorskip("torchao")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = load_model(model_directory(), device="cpu")
    dense, held_out = save_pruned(model, tmp_path / "dense"), HeldOut(model, 1, 8, 32)
    row = bench.measure(dense, form, held_out, tmp_path)
    assert row["reload_difference"] == 0 and row["bytes"] < 0.7 * (dense / "model.safetensors").stat().st_size
    assert abs(row["loss"]["mean"]) < 0.2
