"""The predicted memory of a recovery's first stage, by hand on a tiny model, and what a dry run shows of it."""

import pytest
import torch

from structprune.bench.block_memory import block_memory
from structprune.bench.memory import RUNTIME_BYTES
from structprune.cli.main import main
from structprune.models.adapter import Adapter
from structprune.recovery.settings import RecoverConfig
from structprune.statistics.gradients import saved_bytes

FP32, BF16 = torch.float32, torch.bfloat16
DENSE, SMALL = 4 * 32 * 32 + 3 * 32 * 48 + 64, 4 * 32 * 32 + 3 * 32 * 24 + 64  # weights of a block


def predict(student, teacher, **changes):
    keys = {
        "data.length": 16, "data.held_out": 4, "data.noise": 2, "train.pass_windows": 2, "train.batch": 4,
        "blocks.tokens": 16 * 4 * 5 + 3,
    }  # fmt: skip
    config = RecoverConfig.load(overrides=keys | {key.replace("__", "."): value for key, value in changes.items()})
    return block_memory(Adapter(student), Adapter(teacher), config, (FP32, BF16))


def test_parts_by_hand(tiny_model):
    student, teacher = tiny_model(mlp_hidden_size=24), tiny_model()
    parts = predict(student, teacher)
    assert parts["weights of models"] == 4 * student.num_parameters() + 2 * teacher.num_parameters()
    assert parts["a block of the teacher"] == 2 * DENSE
    assert parts["a block, gradients and optimiser"] == 16 * SMALL  # fp32: weight, gradient and two moments
    assert parts["activations of a pass"] == 2 * 16 * saved_bytes(Adapter(student).blocks[0], FP32)
    assert parts["peak"] == sum(list(parts.values())[:4]) + RUNTIME_BYTES
    # 20 windows that are learnt, 8 noisy held-out ones; a stream in fp32 and one in bfloat16
    assert parts["residual streams, on the host"] == (20 + 8) * 16 * 32 * (4 + 2)


@pytest.mark.parametrize("key", ["teacher__offload", "blocks__offload"])
def test_an_offloaded_model_brings_its_embedding(tiny_model, key):
    student, teacher = tiny_model(mlp_hidden_size=24), tiny_model()
    own = 4 * student.num_parameters() + 2 * 2048 * 32 if key.startswith("teacher") else 4 * 2048 * 32
    assert predict(student, teacher, **{key: True})["weights of models"] == own


def test_an_int8_teacher_makes_one_projection_whole(tiny_model):
    student, teacher = tiny_model(mlp_hidden_size=24), tiny_model()
    parts, plain = predict(student, teacher, teacher__int8=True), predict(student, teacher)
    rows = 4 * 32 + 2 * 48 + 32  # with a scale each
    block = (DENSE - 64) + 4 * rows + 2 * 64
    assert parts["a block of the teacher"] == block + 2 * 32 * 48
    saved = plain["weights of models"] - parts["weights of models"]
    assert saved == 3 * (2 * DENSE - block)


def test_a_dry_run_shows_both_stages(tiny_checkpoint, text_path, tmp_path, capsys):
    dense = tiny_checkpoint()
    keys = ["data.length=16", "train.batch=8", "data.held_out=4", "blocks.tokens=640"]
    command = ["recover", str(dense), "--teacher", str(dense), "--out", str(tmp_path / "out"), "--data", str(text_path)]
    command += ["--device", "cpu", "--dry-run", *(f"--set={key}" for key in keys), "--tokens"]
    assert main([*command, "1280"]) == 0
    shown = capsys.readouterr().out
    assert "5 steps over 640 tokens for every block, block by block\n" in shown and "residual streams" in shown
    assert "10 steps over 1,280 tokens; with those, " in shown and "predictions of a pass" in shown
    assert main([*command, "0"]) == 0
    shown = capsys.readouterr().out
    assert "every block, block by block, 1.0 times each window\n" in shown
    assert "residual streams" in shown and "predictions of a pass" not in shown and not list(tmp_path.glob("out*"))
