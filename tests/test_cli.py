"""The command line as a user meets it: what is written, what is said, and one line with exit code 2 for bad input."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import structprune.cli
from structprune.cli import main
from structprune.config import known_keys
from structprune.models.loading import load_model
from structprune.structured.plan import Plan

SMALL = [
    "calibration.windows=3", "calibration.held_out=2", "calibration.length=16", "calibration.interval=25",
    "structured.split_candidates=2", "structured.split_windows=2", "structured.rounds=8",
]  # fmt: skip
MADE = {
    "README.md", "calibration.safetensors", "config.json", "configuration_structprune.py", "model.safetensors",
    "modeling_structprune.py", "plan.json", "report.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def command(checkpoint, out, text, *more):
    small = [pair for pair in SMALL if "--plan" not in more or not pair.startswith("structured.")]
    small = [pair for pair in small if not str(text).endswith(".safetensors") or not pair.startswith("calibration.")]
    sets = [part for pair in small for part in ("--set", pair)]
    return ["prune", str(checkpoint), "--out", str(out), "--calibration", str(text), *sets, *map(str, more)]


@pytest.mark.parametrize("family", ["llada", "mmada", "dream"])
def test_prune_writes_a_smaller_model_that_loads(family, tiny_checkpoint, text_path, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(command(tiny_checkpoint(family), out, text_path, "--ratio", "0.4")) == 0
    said = capsys.readouterr()
    assert {path.name for path in out.iterdir()} == MADE
    report = json.loads((out / "report.json").read_text())
    small = load_model(out)
    assert small.num_parameters() == report["parameters"]["after"] < report["parameters"]["before"]
    assert abs(report["ratio"] - 0.4) < 0.03
    assert f"Wrote {out}" in said.out and "NELBO" in said.out
    assert set(report) >= {"seconds", "peak_memory_bytes", "versions", "export_class", "held_out_nelbo", "calibration"}


def test_the_saved_calibration_and_plan_replay_the_run(tiny_checkpoint, text_path, tmp_path):
    checkpoint, first, second = tiny_checkpoint(), tmp_path / "first", tmp_path / "second"
    assert main(command(checkpoint, first, text_path, "--ratio", "0.5")) == 0
    replay = command(checkpoint, second, first / "calibration.safetensors", "--plan", first / "plan.json")
    assert main(replay) == 0
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "Made with: a plan that was given" in (second / "README.md").read_text()


def test_options_that_a_replay_has_no_use_for(tiny_checkpoint, text_path, tmp_path, capsys):
    replay = command(
        tiny_checkpoint(), tmp_path / "out", tmp_path / "saved.safetensors", "--set", "calibration.windows=3"
    )
    assert "calibration.windows means nothing for a saved calibration" in refused(replay, capsys, tmp_path / "out")


def test_an_edited_plan_is_applied(tiny_checkpoint, text_path, tmp_path):
    checkpoint, out, plan_file = tiny_checkpoint(), tmp_path / "out", tmp_path / "plan.json"
    assert main(command(checkpoint, tmp_path / "first", text_path, "--ratio", "0.5")) == 0
    values = json.loads((tmp_path / "first" / "plan.json").read_text())
    values["blocks"][0] = {"query_heads": [1, 3], "kv_heads": [1, 3], "channels": [0, 5, 7]}
    plan_file.write_text(json.dumps(values))
    assert main(command(checkpoint, out, text_path, "--plan", plan_file)) == 0
    assert Plan.load(out / "plan.json").blocks[0].channels == (0, 5, 7)
    assert load_model(out).blocks[0].part("gate").weight.shape == (3, 32)


def test_python_in_five_lines(tiny_checkpoint, text_path):
    model = structprune.load_model(tiny_checkpoint())
    config = structprune.Config.load(overrides=[*SMALL, "structured.ratio=0.3", f"calibration.source={text_path}"])
    pruned = structprune.prune(model, config)
    assert pruned.model.num_parameters() < model.num_parameters()


def broken(tiny_checkpoint, name):
    """A checkpoint with one thing wrong."""
    directory = tiny_checkpoint(name=name)
    weights, settings = directory / "model.safetensors", directory / "config.json"
    values = json.loads(settings.read_text())
    if name == "cut-short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "nan":
        state = load_file(weights)
        state["model.transformer.blocks.1.up_proj.weight"][0, 0] = float("nan")
        save_file(state, weights)
    elif name == "half-downloaded":
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        weights.rename(directory / "model-00001-of-00002.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    elif name == "pickled":
        torch.save(load_file(weights), directory / "pytorch_model.bin")
        weights.unlink()
    elif name == "no-mask-id":
        values.pop("mask_token_id")
        (directory / "tokenizer_config.json").write_text("{}")
    else:
        values |= {
            "unknown-type": {"model_type": "lada"}, "moe": {"model_type": "llada_moe"}, "shapes": {"mlp_hidden_size": 64},
        }[name]  # fmt: skip
    settings.write_text(json.dumps(values))
    return directory


CHECKPOINTS = {
    "cut-short": "model.safetensors is cut short",
    "nan": "blocks.1.up_proj.weight holds NaN or Inf",
    "half-downloaded": "lacks model-00002-of-00002.safetensors",
    "pickled": "--allow-pickle",
    "no-mask-id": "--mask-id",
    "unknown-type": "unknown model_type 'lada' (did you mean 'llada'?); supported: llada, mmada, Dream",
    "moe": "LLaDA-MoE is a mixture of experts",
    "shapes": "but config.json asks for (64, 32)",
}
OPTIONS = {
    "ratio 1.0": (["--ratio", "1.0"], "ratio 1.0 lies outside [0, 1)"),
    "ratio nan": (["--ratio", "nan"], "ratio nan lies outside [0, 1)"),
    "ratio too high": (["--ratio", "0.99"], "no plan meets ratio 0.9900: the most is 0.8713"),
    "unknown key": (["--set", "structured.ration=0.3"], "unknown config key 'structured.ration' (did you mean 'ratio'?)"),
    "unknown section": (["--set", "structurd.ratio=0.3"], "unknown config section 'structurd' (did you mean 'structured'?)"),
    "not a number": (["--set", "calibration.windows=many"], "config key calibration.windows = 'many'"),
    "no config": (["--config", "nowhere.yaml"], "no config file at 'nowhere.yaml'"),
    "taylor on clean": (["--set", "structured.score=taylor", "--set", "structured.arm=clean"], "score 'taylor' cannot use arm 'clean'"),
    "magnitude on an arm": (["--set", "structured.score=magnitude", "--set", "structured.arm=masked"], "score 'magnitude' cannot use arm"),
    "short text": (["--set", "calibration.length=64", "--set", "calibration.windows=900"], "lower calibration.windows"),
    "window too long": (["--set", "calibration.length=65"], "exceeds the model's 64 positions"),
    "no text": (["--calibration", "nowhere.txt"], "no calibration text at 'nowhere.txt'"),
    "plan and ratio": (["--plan", "nowhere.json", "--ratio", "0.3"], "--plan says what goes already: leave out --ratio"),
    "plan and score": (["--plan", "x.json", "--set", "structured.score=wanda"], "--plan says what goes already"),
    "no effect": (["--set", "reconstruct.enabled=false", "--set", "reconstruct.constant=true"], "reconstruct.constant = True has no effect"),
    "truth for a number": (["--set", "structured.split=true"], "input should be a number, not true or false"),
    "split": (["--set", "structured.split=99"], "structured.split = 99 does not fit: over all blocks 0 to 9 attention steps"),
    "interval": (["--set", "calibration.interval=60"], "calibration.interval = 60 leaves no noise level"),
    "uniform": (["--set", "export.compat=uniform"], "export.compat = uniform is not possible: blocks would differ in width"),
    "no plan": (["--plan", "nowhere.json"], "no plan file at 'nowhere.json'"),
    "mask id": (["--mask-id", "5000"], "mask id 5000 lies outside the embedding of 2048 tokens"),
    "export": (["--set", "export.compat=official", "--set", "structured.split=1", "--set", "structured.allocation=uniform"], "export.compat = official is not possible"),
    "device": (["--device", "quantum"], "unknown device 'quantum'"),
    "unusable device": (["--device", "meta"], "device 'meta' cannot be used: give cpu or cuda[:N]"),
    "unknown option": (["--ration", "0.5"], "No such option"),
}  # fmt: skip


def refused(arguments, capsys, out):
    """The one line of a refusal; asserts exit code 2 and that nothing was written."""
    before = sorted(path.name for path in out.parent.iterdir())
    assert main(arguments) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.strip()]
    message = [line for line in lines if line.startswith("structprune: error: ")]
    assert len(message) == 1 and "Traceback" not in said.err
    assert sorted(path.name for path in out.parent.iterdir()) == before
    return message[0]


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(case, tiny_checkpoint, text_path, tmp_path, capsys):
    checkpoint, out = broken(tiny_checkpoint, case), tmp_path / "out"
    assert CHECKPOINTS[case] in refused(command(checkpoint, out, text_path), capsys, out)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_refused(case, tiny_checkpoint, text_path, tmp_path, capsys):
    more, message = OPTIONS[case]
    checkpoint, out = tiny_checkpoint(), tmp_path / "out"
    assert message in refused(command(checkpoint, out, text_path, *more), capsys, out)


def test_token_ids_beyond_the_embedding(tiny_checkpoint, text_path, tmp_path, capsys):
    checkpoint = tiny_checkpoint(vocab_size=300, embedding_size=300, mask_token_id=299)
    out = tmp_path / "out"
    assert "but the model embeds 300 tokens" in refused(command(checkpoint, out, text_path), capsys, out)


def test_outputs_that_must_not_be_touched(tiny_checkpoint, text_path, tmp_path, capsys):
    checkpoint, out = tiny_checkpoint(), tmp_path / "out"
    assert main(command(checkpoint, out, text_path, "--ratio", "0.3")) == 0
    capsys.readouterr()
    assert "exists: choose another, or add --overwrite" in refused(command(checkpoint, out, text_path), capsys, out)
    inside = checkpoint / "pruned"
    assert "lies inside the input checkpoint" in refused(command(checkpoint, inside, text_path), capsys, inside)
    foreign = tmp_path / "letters"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    arguments = command(checkpoint, foreign, text_path, "--overwrite")
    assert "holds something else" in refused(arguments, capsys, foreign)
    assert (foreign / "letter.txt").read_text() == "dear"
    assert main(command(checkpoint, out, text_path, "--ratio", "0.5", "--overwrite")) == 0
    assert abs(json.loads((out / "report.json").read_text())["ratio"] - 0.5) < 0.03


def test_a_failed_run_leaves_the_previous_output(tiny_checkpoint, text_path, tmp_path, capsys):
    checkpoint, out = tiny_checkpoint(), tmp_path / "out"
    assert main(command(checkpoint, out, text_path, "--ratio", "0.3")) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    wrong = command(checkpoint, out, text_path, "--overwrite", "--set", "calibration.windows=90000")
    refused(wrong, capsys, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_plan_that_does_not_fit(tiny_checkpoint, text_path, tmp_path, capsys):
    checkpoint, out, plan = tiny_checkpoint(), tmp_path / "out", tmp_path / "plan.json"
    block = {"query_heads": [0, 9], "kv_heads": [0, 1], "channels": [0]}
    plan.write_text(json.dumps({"format": 1, "family": "llada", "notes": {}, "blocks": [block] * 3}))
    line = refused(command(checkpoint, out, text_path, "--plan", plan), capsys, out)
    assert "the plan's block 0: query_heads names 9, but the model has 4" in line


def test_a_plan_and_the_class_it_does_not_allow(tiny_checkpoint, text_path, tmp_path, capsys, monkeypatch):
    """Refused before the weights are read, whatever the configuration says of scores."""
    checkpoint, out, plan = tiny_checkpoint(), tmp_path / "out", tmp_path / "plan.json"
    block = {"query_heads": [0, 2, 3], "kv_heads": [0, 2, 3], "channels": [0, 4]}
    plan.write_text(json.dumps({"format": 1, "family": "llada", "notes": {}, "blocks": [block] * 3}))
    given = command(checkpoint, out, text_path, "--plan", plan)
    with monkeypatch.context() as patch:
        patch.setattr("structprune.models.loading._read_shard", lambda path: pytest.fail("weights were read"))
        assert "heads were removed" in refused([*given, "--set", "export.compat=official"], capsys, out)
    assert main([*given, "--set", "export.compat=uniform"]) == 0
    assert json.loads((out / "report.json").read_text())["export_class"] == "uniform"


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_inspect_prints_json_and_writes_nothing(tiny_checkpoint, tmp_path, capsys):
    checkpoint = tiny_checkpoint()
    (checkpoint / "model.safetensors").unlink()
    before = sorted(checkpoint.iterdir())
    assert main(["inspect", str(checkpoint), "--ratio", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["block_parameters"]["before"] == 3 * (4 * 32 * 32 + 3 * 32 * 48)
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
    assert "structured.score: obs, wanda" in said and "masking.order: sequential, one-shot" in said
    assert all(option in said for option in ("--out", "--plan", "--device", "--nm", "--mask-id", "cuda if there"))


def test_functions_of_the_command_line_are_short():
    home = Path(structprune.cli.__file__)
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (home, *(home.parent / "verbs").glob("*.py"))]
    functions = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in functions}
    assert lengths["prune"] < 50 and max(lengths.values()) < 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_writes_nothing(number, tiny_checkpoint, text_path, tmp_path):
    out = tmp_path / "out"
    many = ["--set", "calibration.windows=400", "--set", "calibration.interval=1"]
    arguments = command(tiny_checkpoint(), out, text_path, *many)
    # imports take seconds on a busy machine: the signal is to meet the run itself
    code = "import structprune.runs; from structprune.cli import run; print('ready', flush=True); run()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    listen = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731  a suite run in the background ignores SIGINT
    command_line = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command_line, text=True, env=environment, preexec_fn=listen, **pipes)
    assert process.stdout.readline() == "ready\n"
    time.sleep(2)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; nothing was written" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llada-tiny", "text.txt"]


def test_every_configuration_key_is_read_somewhere():
    """An option that is accepted and ignored is a defect: every key's name occurs in code outside config.py."""
    code = "\n".join(
        path.read_text() for path in Path(structprune.__file__).parent.rglob("*.py") if path.name != "config.py"
    )
    for name in known_keys():
        key = name.rpartition(".")[2]
        assert f".{key}" in code or f'"{key}"' in code, name
