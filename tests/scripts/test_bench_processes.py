"""One process against two: arithmetic of shares, a run of stand-ins, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def bench(scripts):
    return scripts("bench_processes")


@pytest.fixture
def stand_in(bench, monkeypatch):
    """Prunings without models: 8 of 10 seconds of scores are shared, 4 of refits are not, 1 lies outside of phases."""

    def prune(out, more, count):
        out.mkdir(parents=True)
        weight = torch.tensor([3.0, 4.0 + (1e-3 if count > 1 else 0)])
        save_file({"a": weight}, out / "model.safetensors")
        phases = {"scores": 2 + 8 / count, "refit": 4.0}
        return phases | {"total": sum(phases.values()) + 1}

    monkeypatch.setattr(bench, "prune", prune)
    monkeypatch.setattr(bench, "usable_cores", lambda: 2)


def test_shares_and_predictions_by_hand(bench, stand_in, tmp_path):
    out = tmp_path / "x.json"
    assert bench.main(["--rounds", "2", "--out", str(out)]) == 0
    row = json.loads(out.read_text(encoding="utf-8"))["runs"]["masks, 0.5"]
    assert row["shared"] == {"scores": 8.0, "refit": 0.0, "other": 0.0} and row["ratio"] == 15 / 11
    assert row["predicted"] == {"4": 15 / 9, "8": 15 / 8}
    assert row["farthest"] == pytest.approx([2e-4, 2e-4], rel=1e-3)


def test_a_phase_shares_at_most_all_of_itself(bench):
    assert bench.shared_seconds(3.0, 1.0) == 3.0 and bench.shared_seconds(3.0, 3.5) == 0.0
    assert bench.shared_seconds(3.0, 2.0) == 2.0


@pytest.mark.parametrize("cores, options, message", [
    (1, [], "1 core is not enough"), (2, ["--rounds", "0"], "--rounds = 0: give at least 1"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(bench, stand_in, monkeypatch, tmp_path, capsys, cores, options, message):
    monkeypatch.setattr(bench, "usable_cores", lambda: cores)
    assert bench.main([*options, "--out", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_failed_pruning_is_named(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RUNS", {})
    with pytest.raises(ValueError, match="the pruning of 1 processes ended with 2: .*odd"):
        bench.prune(tmp_path / "out", ["--score", "odd"], 1)
