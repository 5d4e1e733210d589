"""Layers of zeros are pruned like others; weights that overflow are named, in one line."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune import load_model
from structprune.cli.main import main
from structprune.config import Config
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.runs.prune import prune

ZERO = {
    "everything": lambda model: list(model.parameters()),
    "embedding": lambda model: [model.embedding.weight],
    "down": lambda model: [Adapter(model).blocks[1]["down"].weight],
    "attention output": lambda model: [Adapter(model).blocks[1]["attention_output"].weight],
    "up": lambda model: [Adapter(model).blocks[1]["up"].weight],
}
METHODS = {
    "obs": {"structured.score": "obs"},
    "obs without refit": {"structured.score": "obs", "structured.split": "joint", "reconstruct.enabled": False},
    "taylor": {"structured.score": "taylor"},
    "fluctuation": {"structured.score": "fluctuation", "reconstruct.mode": "bias"},
    "sparsegpt": {"method": "unstructured", "masking.score": "sparsegpt"},
    "ria": {"method": "nm", "masking.score": "ria"},
}


@pytest.fixture
def changed_model(tiny_checkpoint):
    """`changed_model(family, parameters, factor)` -> a tiny model, some of its parameters times a factor."""

    def make(family, parameters, factor):
        model = load_model(tiny_checkpoint(family))
        with torch.no_grad():
            for parameter in parameters(model):
                parameter.mul_(factor)
        return model

    return make


@pytest.fixture
def run(text_path):
    """`run(model, changes)` -> the result of a quick run."""
    small = {"windows": 2, "held_out": 2, "length": 16, "interval": 25, "source": str(text_path)}

    def make(model, changes):
        values = {f"calibration.{key}": value for key, value in small.items()} | changes
        if changes.get("method") is None and "structured.split" not in changes:
            values |= {"structured.split_candidates": 2, "structured.split_windows": 1}
        return prune(model, Config.load(overrides=values))

    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
def test_layers_of_zeros_are_pruned(changed_model, run, family, zero, method):
    result = run(changed_model(family, ZERO[zero], 0.0), METHODS[method])
    losses = [value for value in result.report["held_out_nelbo"].values() if isinstance(value, float)]
    assert len(losses) >= 2 and all(map(math.isfinite, losses))
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())
    assert all(math.isfinite(fit["error"]) for fit in result.report["refit"])
    if zero == "everything":
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)  # each token stays as likely


@pytest.mark.parametrize("score", ["wanda", "taylor"])
def test_dead_channels_go_first_and_cost_nothing(changed_model, run, score):
    """Half of one block's channels are always 0."""

    def dead(model):
        return [Adapter(model).blocks[1]["up"].weight[::2]]

    ratio = 24 * 96 / (3 * (4 * 32 * 32 + 3 * 32 * 48))  # what 24 channels have, of 3 blocks
    changes = {"structured.ratio": ratio, "structured.split": 0, "structured.round_to": 1, "structured.score": score}
    result = run(changed_model("llada", dead, 0.0), changes | {"reconstruct.enabled": False})
    assert [block.widths.channels for block in Adapter(result.model).blocks] == [48, 24, 48]
    check = result.report["held_out_nelbo"]
    assert check["plain_removal"] == pytest.approx(check["dense"], rel=1e-6)


HUGE = {
    "obs": "attention heads: its activations overflow in float32: the largest weight is .*blocks.1",
    "wanda": "attention heads: its activations overflow in float32: the largest weight is .*blocks.1",
    "fluctuation": "attention heads: its activations overflow in float32: the largest weight is .*blocks.1",
    "taylor": "attention heads: its gradients overflow in float32: the largest weight is .*blocks.1",
    "magnitude": "attention heads: its squared weights overflow in float32: the largest weight is .*blocks.1",
}


@pytest.mark.parametrize("score", HUGE)
def test_weights_that_overflow_are_named(changed_model, run, score):
    model = changed_model("llada", lambda model: Adapter(model).blocks[1].module.parameters(), 1e30)
    with pytest.raises(UserError, match=rf"^block [01], {HUGE[score]}.*; use a sound checkpoint$"):
        run(model, {"structured.score": score})


@pytest.mark.parametrize(
    "score, refit, message",
    [
        ("wanda", True, "block 1, up: the sums of its refit overflow: .*reconstruct.enabled = false"),
        ("wanda", False, "block 1, input of down: its activations overflow in float32"),
        ("sparsegpt", False, "block 1, input of gate and up: its sparsegpt scores overflow in float32"),
    ],
)
def test_weights_that_overflow_are_named_under_masks(changed_model, run, score, refit, message):
    model = changed_model("dream", lambda model: [Adapter(model).blocks[1]["up"].weight], 1e20)
    changes = {"method": "unstructured", "masking.score": score, "reconstruct.enabled": refit}
    with pytest.raises(UserError, match=f"^{message}"):
        run(model, changes)


def test_the_command_line_ends_with_code_2_and_writes_nothing(
    tiny_checkpoint, prune_command, text_path, tmp_path, capsys
):
    checkpoint = tiny_checkpoint("llada")
    state = load_file(checkpoint / "model.safetensors")
    name = "model.transformer.blocks.1.ff_out.weight"
    state[name] = state[name] * 1e30
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert main(prune_command(checkpoint, tmp_path / "out", text_path)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "structprune: error: block 2, attention heads: its activations overflow in float32: the largest"
    )
    assert name in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["obs", "sparsegpt"])
def test_a_loss_that_is_no_number_is_refused(changed_model, run, method):
    """Where no score sees it: everything before the head is sound."""
    model = changed_model("llada", lambda model: [model.final_norm.weight], float("nan"))
    with pytest.raises(UserError, match="dense model's loss on held-out windows is nan in float32: the largest"):
        run(model, METHODS[method])
