"""The speed of a training with denormal numbers computed and flushed, and in bfloat16, on a training of a moment."""

import json

import pytest


@pytest.fixture
def bench(scripts):
    return scripts("bench_training")


@pytest.mark.slow
def test_all_trainings_learn_the_same_and_the_ratios_are_of_their_seconds(bench, tmp_path):
    out = tmp_path / "x.json"
    other = {"machine": {"processor": "another"}, "ratio": 2.0}
    out.write_text(json.dumps({"runs": [other, {"machine": bench.describe_machine(), "ratio": 3.0}]}), encoding="utf-8")
    assert bench.main(["--tokens", "2048", "--out", str(out)]) == 0
    kept, result = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert kept == other  # of another processor; the earlier one of this is replaced
    computed, flushed, half = result["computed"], result["flushed"], result["bfloat16"]
    assert computed["tokens"] == flushed["tokens"] == half["tokens"] == 2048
    assert result["ratio"] == computed["seconds"] / flushed["seconds"]
    assert result["bfloat16_ratio"] == flushed["seconds"] / half["seconds"]
    assert half["kl"] == pytest.approx(flushed["kl"], rel=0.05) and half["kl"] != flushed["kl"]
    assert computed["kl"] == pytest.approx(flushed["kl"], rel=1e-3)


def test_no_tokens_are_refused(bench, tmp_path, capsys):
    assert bench.main(["--tokens", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert "--tokens = 0: give at least 1" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_results_of_another_form_are_refused_before_training(bench, tmp_path, capsys):
    out = tmp_path / "x.json"
    out.write_text('{"machine": {}, "ratio": 2.0}', encoding="utf-8")
    assert bench.main(["--out", str(out)]) == 2
    assert f"{out} has no runs, it is of another version: give another --out" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == '{"machine": {}, "ratio": 2.0}'
