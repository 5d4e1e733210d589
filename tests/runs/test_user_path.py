"""The way of a new user, command by command: prune, train back, generate, export, convert, publish, load elsewhere."""

import json
import subprocess
import sys

import gguf
import pytest

from structprune.assets import model_directory, text_file

FEW = ("calibration.windows=16", "calibration.held_out=8", "calibration.copies=1", "calibration.length=64")
EQUAL = ("structured.allocation=uniform", "structured.split=0", "structured.round_to=32", "export.compat=official")
SHORT = ("train.method=full", "train.batch=4", "data.length=64", "data.held_out=4", "train.evaluations=1")
ELSEWHERE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "structprune" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, gen_length=8, block_length=8, steps=8)[0]))
assert not [name for name in sys.modules if name.split(".")[0] == "structprune"]
"""


def sets(keys: tuple[str, ...]) -> list[str]:
    return [part for key in keys for part in ("--set", key)]


@pytest.mark.slow
def test_from_the_dense_model_to_the_hub(hub, tmp_path):
    dense, text = str(model_directory()), str(text_file("calibration.txt"))
    small, recovered, official = (str(tmp_path / name) for name in ("small", "recovered", "official"))
    file = tmp_path / "model.gguf"
    prompt = "The capital of France is"
    commands = [
        [
            "prune",
            dense,
            "--out",
            small,
            "--ratio",
            "0.3",
            "--calibration",
            text,
            "--device",
            "cpu",
            *sets(FEW + EQUAL),
        ],
        ["recover", small, "--teacher", dense, "--out", recovered, "--data", text, "--tokens", "1024", *sets(SHORT)],
        ["generate", recovered, "--prompt", prompt, "--gen-length", "8", "--json"],
        ["export", recovered, "--out", official, "--compat", "official", "--gguf", str(file)],
        ["export", official, "--push", "me/small"],
    ]
    outputs = []
    for command in commands:
        done = hub.structprune(*command)
        assert done.returncode == 0, (command[0], done.stderr)
        outputs.append(done.stdout)
    assert json.loads(outputs[2])["prompt"] == prompt and len(json.loads(outputs[2])["ids"]) == 8
    assert "logits are the source's, bit for bit" in outputs[3]
    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == "llada"
    config = json.loads(hub.files["config.json"])
    assert config["model_type"] == "llada" and config["architectures"] == ["LLaDAModelLM"]
    report = json.loads(hub.files["report.json"])
    assert report["recoveries"][0]["tokens"] == 1024 and report["exports"][0]["difference"] == 0
    card = hub.files["README.md"].decode()
    assert '"me/small"' in card and "Trained back" in card and "PATH" not in card
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in hub.files.items():
        (arrived / name).write_bytes(content)
    done = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, str(arrived)], capture_output=True, text=True)
    assert done.returncode == 0 and "The capital of France is" in done.stdout, done.stderr
