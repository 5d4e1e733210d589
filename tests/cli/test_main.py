"""The command line as a user meets it: what is written, what is said, and one line with exit code 2 for bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import structprune
from structprune.cli.main import main
from structprune.config import Config
from structprune.models.loading import load_model
from structprune.structured.plan import Plan

MADE = {
    "README.md", "calibration.safetensors", "config.json", "configuration_structprune.py", "model.safetensors",
    "generation_structprune.py", "layers_structprune.py", "modeling_structprune.py", "rotary_structprune.py",
    "sampling_structprune.py", "plan.json", "report.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.mark.parametrize("family", ["llada", "mmada", "dream", "a2d-qwen3"])
def test_prune_writes_a_smaller_model_that_loads(family, tiny_checkpoint, text_path, tmp_path, capsys, prune_command):
    out = tmp_path / "small"
    assert main(prune_command(tiny_checkpoint(family), out, text_path, "--ratio", "0.4")) == 0
    said = capsys.readouterr()
    assert {path.name for path in out.iterdir()} - {"a2d_structprune.py"} == MADE
    report = json.loads((out / "report.json").read_text())
    small = load_model(out)
    assert small.num_parameters() == report["parameters"]["after"] < report["parameters"]["before"]
    assert abs(report["ratio"] - 0.4) < 0.03
    assert f"Wrote {out}" in said.out and "NELBO" in said.out
    assert set(report) >= {"seconds", "peak_memory_bytes", "versions", "export_class", "held_out_nelbo", "calibration"}


@pytest.mark.slow
def test_the_saved_calibration_and_plan_replay_the_run(tiny_checkpoint, text_path, tmp_path, prune_command):
    checkpoint, first, second = tiny_checkpoint(), tmp_path / "first", tmp_path / "second"
    assert main(prune_command(checkpoint, first, text_path, "--ratio", "0.5")) == 0
    replay = prune_command(checkpoint, second, first / "calibration.safetensors", "--plan", first / "plan.json")
    assert main(replay) == 0
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "Made with: a plan that was given" in (second / "README.md").read_text()


@pytest.mark.slow
def test_an_edited_plan_is_applied(tiny_checkpoint, text_path, tmp_path, prune_command):
    checkpoint, out, plan_file = tiny_checkpoint(), tmp_path / "out", tmp_path / "plan.json"
    assert main(prune_command(checkpoint, tmp_path / "first", text_path, "--ratio", "0.5")) == 0
    values = json.loads((tmp_path / "first" / "plan.json").read_text())
    values["blocks"][0] = {"query_heads": [1, 3], "kv_heads": [1, 3], "channels": [0, 5, 7]}
    plan_file.write_text(json.dumps(values))
    assert main(prune_command(checkpoint, out, text_path, "--plan", plan_file)) == 0
    assert Plan.load(out / "plan.json").blocks[0].channels == (0, 5, 7)
    assert load_model(out).blocks[0].part("gate").weight.shape == (3, 32)


def test_python_in_five_lines(tiny_checkpoint, text_path, small_run):
    model = structprune.load_model(tiny_checkpoint())
    config = structprune.Config.load(overrides=[*small_run, "structured.ratio=0.3", f"calibration.source={text_path}"])
    pruned = structprune.prune(model, config)
    assert pruned.model.num_parameters() < model.num_parameters()


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_inspect_prints_json_and_writes_nothing(tiny_checkpoint, tmp_path, capsys):
    checkpoint = tiny_checkpoint()
    (checkpoint / "model.safetensors").unlink()
    before = sorted(checkpoint.iterdir())
    assert main(["inspect", str(checkpoint), "--ratio", "0.5", "--json", "--set", "calibration.length=64"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["block_parameters"]["before"] == 3 * (4 * 32 * 32 + 3 * 32 * 48)
    assert sorted(checkpoint.iterdir()) == before


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_every_verb(arguments, capsys):
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert all(verb in said.out for verb in ("prune", "inspect", "demo")) and not said.err


def test_help_shows_examples_and_keys(capsys):
    assert main(["prune", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Prune a checkpoint: remove heads and MLP channels" in said and "--calibration notes.txt" in said
    assert "--score: obs, wanda" in said and "masking.order: sequential, one-shot" in said
    assert all(option in said for option in ("--out", "--plan", "--device", "--nm", "--mask-id", "cuda if available"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_writes_nothing(number, tiny_checkpoint, text_path, tmp_path, prune_command):
    out = tmp_path / "out"
    many = ["--set", "calibration.windows=400", "--set", "calibration.interval=1"]
    arguments = prune_command(tiny_checkpoint(), out, text_path, *many)
    code = "from structprune.cli.main import run; run()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    listen = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731  a suite run in the background ignores SIGINT
    command_line = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command_line, text=True, env=environment, preexec_fn=listen, **pipes)
    while not (tmp_path / "out.work").exists():  # the signal is to meet the run itself
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    # at the first step; tests/cli/test_work.py has a signal after it
    assert process.returncode == 128 + number and said == "structprune: interrupted; nothing was written\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llada-tiny", "text.txt"]


def test_every_configuration_key_is_read_somewhere():
    """An option that is accepted and ignored is a defect: every key's name occurs in code outside config/."""
    package = Path(structprune.__file__).parent
    code = "\n".join(path.read_text() for path in package.rglob("*.py") if package / "config" not in path.parents)
    for name in Config.known_keys():
        key = name.rpartition(".")[2]
        assert f".{key}" in code or f'"{key}"' in code, name


@pytest.mark.parametrize("path", sorted((Path(structprune.__file__).parent / "assets" / "help").glob("*.txt")))
def test_commands_in_help_can_be_copied(path):
    """On a terminal of 80 columns they are not reflowed: a long one goes on behind a backslash."""
    lines = path.read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line.startswith(("structprune ", "  --"))]
    assert commands and max(map(len, commands)) <= 78
    for line, after in zip(lines, [*lines[1:], ""]):
        assert line.endswith(" \\") == after.startswith("  "), line
