"""Bad input on the command line: one line, exit code 2, and nothing written or touched."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune.cli.main import main


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
            "unknown-type": {"model_type": "lada"},
            "shapes": {"mlp_hidden_size": 64},
        }[name]
    settings.write_text(json.dumps(values))
    return directory


CHECKPOINTS = {
    "cut-short": "model.safetensors is cut short",
    "nan": "blocks.1.up_proj.weight holds NaN or Inf",
    "half-downloaded": "lacks model-00002-of-00002.safetensors",
    "pickled": "--allow-pickle",
    "no-mask-id": "--mask-id",
    "unknown-type": "unknown model_type 'lada' (did you mean 'llada'?); supported: llada, mmada, Dream",
    "shapes": "but config.json asks for (64, 32)",
}


OPTIONS = {
    "ratio 1.0": (["--ratio", "1.0"], "ratio 1.0 lies outside [0, 1)"),
    "ratio nan": (["--ratio", "nan"], "ratio nan lies outside [0, 1)"),
    "ratio too high": (["--ratio", "0.99"], "no plan meets ratio 0.9900: the most is 0.8713"),
    "unknown key": (
        ["--set", "structured.ration=0.3"],
        "unknown config key 'structured.ration' (did you mean 'ratio'?)",
    ),
    "unknown section": (
        ["--set", "structurd.ratio=0.3"],
        "unknown config section 'structurd' (did you mean 'structured'?)",
    ),
    "not a number": (["--set", "calibration.windows=many"], "config key calibration.windows = 'many'"),
    "no config": (["--config", "nowhere.yaml"], "no config file at 'nowhere.yaml'"),
    "taylor on clean": (
        ["--set", "structured.score=taylor", "--set", "structured.arm=clean"],
        "score 'taylor' cannot use arm 'clean'",
    ),
    "magnitude on an arm": (
        ["--set", "structured.score=magnitude", "--set", "structured.arm=masked"],
        "score 'magnitude' cannot use arm",
    ),
    "short text": (["--set", "calibration.length=64", "--set", "calibration.windows=900"], "lower calibration.windows"),
    "window too long": (["--set", "calibration.length=65"], "exceeds the model's 64 positions"),
    "no text": (["--calibration", "nowhere.txt"], "no calibration text at 'nowhere.txt'"),
    "plan and ratio": (
        ["--plan", "nowhere.json", "--ratio", "0.3"],
        "--plan already says what is removed: leave out --ratio",
    ),
    "plan and score": (["--plan", "x.json", "--set", "structured.score=wanda"], "--plan already says what is removed"),
    "no effect": (
        ["--set", "reconstruct.enabled=false", "--set", "reconstruct.constant=true"],
        "reconstruct.constant = True has no effect",
    ),
    "truth for a number": (["--set", "structured.split=true"], "input should be a number, not true or false"),
    "split": (
        ["--set", "structured.split=99"],
        "structured.split = 99 does not fit: over all blocks 0 to 9 attention steps",
    ),
    "interval": (["--set", "calibration.interval=60"], "calibration.interval = 60 leaves no noise level"),
    "uniform": (
        ["--set", "export.compat=uniform"],
        "export.compat = uniform is not possible: blocks would differ in width",
    ),
    "no plan": (["--plan", "nowhere.json"], "no plan file at 'nowhere.json'"),
    "mask id": (["--mask-id", "5000"], "mask id 5000 lies outside the embedding of 2048 tokens"),
    "export": (
        ["--set", "export.compat=official", "--set", "structured.split=1", "--set", "structured.allocation=uniform"],
        "export.compat = official is not possible",
    ),
    "device": (["--device", "quantum"], "unknown device 'quantum'"),
    "unusable device": (["--device", "meta"], "device 'meta' cannot be used: give cpu or cuda[:N]"),
    "unknown option": (["--ration", "0.5"], "No such option"),
}


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
def test_a_bad_checkpoint_is_refused(case, tiny_checkpoint, text_path, tmp_path, capsys, prune_command):
    checkpoint, out = broken(tiny_checkpoint, case), tmp_path / "out"
    assert CHECKPOINTS[case] in refused(prune_command(checkpoint, out, text_path), capsys, out)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_refused(case, tiny_checkpoint, text_path, tmp_path, capsys, prune_command):
    more, message = OPTIONS[case]
    checkpoint, out = tiny_checkpoint(), tmp_path / "out"
    assert message in refused(prune_command(checkpoint, out, text_path, *more), capsys, out)


def test_token_ids_beyond_the_embedding(tiny_checkpoint, text_path, tmp_path, capsys, prune_command):
    checkpoint = tiny_checkpoint(vocab_size=300, embedding_size=300, mask_token_id=299)
    out = tmp_path / "out"
    assert "but the model embeds 300 tokens" in refused(prune_command(checkpoint, out, text_path), capsys, out)


@pytest.mark.slow
def test_outputs_that_must_not_be_touched(tiny_checkpoint, text_path, tmp_path, capsys, prune_command):
    checkpoint, out = tiny_checkpoint(), tmp_path / "out"
    assert main(prune_command(checkpoint, out, text_path, "--ratio", "0.3")) == 0
    capsys.readouterr()
    assert "exists: choose another, or add --overwrite" in refused(
        prune_command(checkpoint, out, text_path), capsys, out
    )
    inside = checkpoint / "pruned"
    assert "lies inside the input checkpoint" in refused(prune_command(checkpoint, inside, text_path), capsys, inside)
    foreign = tmp_path / "letters"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    arguments = prune_command(checkpoint, foreign, text_path, "--overwrite")
    assert "holds something other than" in refused(arguments, capsys, foreign)
    assert (foreign / "letter.txt").read_text() == "dear"
    assert main(prune_command(checkpoint, out, text_path, "--ratio", "0.5", "--overwrite")) == 0
    assert abs(json.loads((out / "report.json").read_text())["ratio"] - 0.5) < 0.03


@pytest.mark.slow
def test_a_failed_run_leaves_the_previous_output(tiny_checkpoint, text_path, tmp_path, capsys, prune_command):
    checkpoint, out = tiny_checkpoint(), tmp_path / "out"
    assert main(prune_command(checkpoint, out, text_path, "--ratio", "0.3")) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    wrong = prune_command(checkpoint, out, text_path, "--overwrite", "--set", "calibration.windows=90000")
    refused(wrong, capsys, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_plan_that_does_not_fit(tiny_checkpoint, text_path, tmp_path, capsys, prune_command):
    checkpoint, out, plan = tiny_checkpoint(), tmp_path / "out", tmp_path / "plan.json"
    block = {"query_heads": [0, 9], "kv_heads": [0, 1], "channels": [0]}
    plan.write_text(json.dumps({"format": 1, "family": "llada", "notes": {}, "blocks": [block] * 3}))
    line = refused(prune_command(checkpoint, out, text_path, "--plan", plan), capsys, out)
    assert "the plan's block 0: query_heads names 9, but the model has 4" in line


def test_a_plan_and_the_class_it_does_not_allow(
    tiny_checkpoint, text_path, tmp_path, capsys, monkeypatch, prune_command
):
    """Refused before the weights are read, whatever the configuration says of scores."""
    checkpoint, out, plan = tiny_checkpoint(), tmp_path / "out", tmp_path / "plan.json"
    block = {"query_heads": [0, 2, 3], "kv_heads": [0, 2, 3], "channels": [0, 4]}
    plan.write_text(json.dumps({"format": 1, "family": "llada", "notes": {}, "blocks": [block] * 3}))
    given = prune_command(checkpoint, out, text_path, "--plan", plan)
    with monkeypatch.context() as patch:
        patch.setattr("structprune.models.loading._read_shard", lambda path: pytest.fail("weights were read"))
        assert "heads were removed" in refused([*given, "--set", "export.compat=official"], capsys, out)
    assert main([*given, "--set", "export.compat=uniform"]) == 0
    assert json.loads((out / "report.json").read_text())["export_class"] == "uniform"


def test_options_that_a_replay_has_no_use_for(tiny_checkpoint, text_path, tmp_path, capsys, prune_command):
    replay = prune_command(
        tiny_checkpoint(), tmp_path / "out", tmp_path / "saved.safetensors", "--set", "calibration.windows=3"
    )
    assert "calibration.windows has no effect on a saved calibration" in refused(replay, capsys, tmp_path / "out")
