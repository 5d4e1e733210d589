"""scripts/bench/bench_sinks.py and scripts/studies/sink_study.py on tiny sizes."""

import json
from pathlib import Path

import pytest
import torch

from structprune.assets import model_directory
from structprune.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[2] / "scripts" / "results"


def test_cost_is_measured_in_one_run(scripts, tmp_path, capsys):
    out = tmp_path / "cost.json"
    arguments = ["--length", "32", "--width", "64", "--blocks", "1", "--rounds", "2", "--out", str(out)]
    assert scripts("bench_sinks").main(arguments) == 0
    result = json.loads(out.read_text())
    assert set(result["median_ms"]) == {"plain", "mass", "heads"} and set(result["ratio"]) == {"mass", "heads"}
    assert "with all that" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--width", "100"], ["--rounds", "0"], ["--device", "tpu"]])
def test_bad_options_are_one_line(scripts, arguments, capsys):
    assert scripts("bench_sinks").main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_kept_result_meets_the_target():
    result = json.loads((RESULTS / "sinks_cost.json").read_text())
    assert result["settings"]["length"] == 1024 and result["settings"]["width"] == 512
    assert max(ratio["median"] for ratio in result["ratio"].values()) <= result["target"] == 1.3


def test_study_writes_figures_and_pictures(scripts, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=2048, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path / "tiny")
    load_tokenizer(model_directory()).save_pretrained(tmp_path / "tiny")
    results = tmp_path / "results"
    results.mkdir()
    study = scripts("sink_study").study
    assert study([str(tmp_path / "tiny"), "--windows", "1", "--length", "40"], results) == 0
    ours, theirs = (json.loads((results / f"sinks_{name}.json").read_text()) for name in ("embedded", "smollm2"))
    assert [run["kind"] for run in ours["runs"]] == ["forward", "reverse"] and theirs["runs"][0]["model"] == "tiny"
    assert ours["runs"][0]["sequences"] == 1 and "detail" not in ours["runs"][0]
    assert ours["command"] == "structprune sinks llada-docs --against tiny --windows 1 --length 40"
    null = json.loads((results / "sinks_untrained.json").read_text())
    assert [(run["model"], run["kind"]) for run in null["runs"]] == [
        ("untrained-llada", "forward"), ("untrained-llada", "reverse"), ("untrained-llama", "reverse"),
    ]  # fmt: skip
    assert len(list(results.glob("sinks_*.png"))) == 4 and (results / "sinks_drift.gif").exists()
