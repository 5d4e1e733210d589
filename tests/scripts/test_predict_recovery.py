"""Predictions of recoveries at true size: what the configurations ask for, of models of the stated sizes."""

import json

import pytest


@pytest.fixture
def script(scripts):
    return scripts("predict_recovery")


def test_recipes_fit_one_gpu_of_80_gb(script, tmp_path):
    out = tmp_path / "x.json"
    assert script.main(["--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    llada, dream = (result["shapes"][name] for name in ("LLaDA-8B", "Dream-7B"))
    assert llada["parameters"]["dense"] == 8_015_581_184 and dream["parameters"]["dense"] == 7_615_616_512
    for row in (llada, dream):
        assert 0.55 < row["parameters"]["pruned"] / row["parameters"]["dense"] < 0.59  # the embeddings stay
        assert row["memory"]["teacher weights"] == 2 * row["parameters"]["dense"]
        assert 25e9 < row["memory"]["peak"] < 40e9
        assert row["tokens"] == pytest.approx(50e6, rel=1e-2)
        # teacher 2, student 2 forward, again and backward, operations a weight and token
        assert 30e9 < sum(row["cost"]["operations"].values()) / row["tokens"] < 60e9
    a2d, sdar = (result["shapes"][name] for name in ("A2D-Qwen3-0.6B", "SDAR-1.7B-Chat"))
    assert a2d["parameters"]["dense"] == 596_049_920  # the head is the embedding
    assert sdar["parameters"]["dense"] == 2_031_739_904
    for row in (a2d, sdar):
        assert row["memory"]["teacher weights"] == 2 * row["parameters"]["dense"]
        assert row["memory"]["peak"] < 20e9 and row["tokens"] == pytest.approx(50e6, rel=1e-2)
    nemotron, moe, llada2 = (
        result["shapes"][name] for name in ("Nemotron-Labs-Diffusion-3B", "LLaDA-MoE-7B-A1B", "LLaDA2.0-mini")
    )
    assert nemotron["memory"]["peak"] < 40e9 and llada2["memory"]["peak"] < 70e9  # all experts are on the device
    each = {row["config"]: sum(row["cost"]["operations"].values()) / row["tokens"] for row in result["shapes"].values()}
    assert each["llada-moe.yaml"] < each["llada.yaml"] / 4  # a token sees 8 of 64 experts
    assert moe["memory"]["teacher weights"] == 2 * moe["parameters"]["dense"] > 14e9
    assert (
        each["llada2-mini.yaml"] / llada2["parameters"]["dense"] < each["sdar.yaml"] / sdar["parameters"]["dense"] / 5
    )


def test_a_ratio_out_of_range_is_refused(script, tmp_path, capsys):
    assert script.main(["--ratio", "1.5", "--out", str(tmp_path / "x.json")]) == 2
    assert "--ratio 1.5: give a number between 0 and 1" in capsys.readouterr().err and not list(tmp_path.iterdir())
