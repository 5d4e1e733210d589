"""The speed of a training with denormal numbers computed and flushed, on a training of a moment."""

import json

import pytest


@pytest.fixture
def bench(scripts):
    return scripts("bench_training")


@pytest.mark.slow
def test_both_trainings_learn_the_same_and_the_ratio_is_of_their_seconds(bench, tmp_path):
    out = tmp_path / "x.json"
    assert bench.main(["--tokens", "2048", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    computed, flushed = result["computed"], result["flushed"]
    assert computed["tokens"] == flushed["tokens"] == 2048
    assert result["ratio"] == computed["seconds"] / flushed["seconds"]
    assert computed["kl"] == pytest.approx(flushed["kl"], rel=1e-3)


def test_no_tokens_are_refused(bench, tmp_path, capsys):
    assert bench.main(["--tokens", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert "--tokens = 0: give at least 1" in capsys.readouterr().err and not list(tmp_path.iterdir())
