"""The predicted memory of a recovery, by hand on a tiny model, and what a dry run shows of it."""

import pytest
import torch

from structprune.bench.memory import RUNTIME_BYTES
from structprune.bench.recovery_memory import folder_bytes, lora_numbers, recovery_memory
from structprune.cli.main import main
from structprune.models.adapter import Adapter
from structprune.models.int8 import to_int8
from structprune.models.logits import LOGIT_BYTES
from structprune.recovery.settings import RecoverConfig
from structprune.statistics.gradients import saved_bytes

FP32, BF16 = torch.float32, torch.bfloat16


def config(**changes):
    keys = {"data.length": 16, "data.held_out": 4, "data.noise": 2, "train.pass_windows": 2}
    return RecoverConfig.load(overrides=keys | {key.replace("__", "."): value for key, value in changes.items()})


def predict(student, teacher, dtypes=(FP32, BF16), **changes):
    return recovery_memory(Adapter(student), Adapter(teacher), config(**changes), dtypes)


def test_parts_by_hand(tiny_model):
    student, teacher = tiny_model(mlp_hidden_size=24), tiny_model()
    parts = predict(student, teacher, train__method="full")
    own, theirs = student.num_parameters(), teacher.num_parameters()
    block = saved_bytes(Adapter(student).blocks[0], FP32)
    assert parts["student weights"] == 4 * own and parts["teacher weights"] == 2 * theirs
    assert parts["gradients and optimiser"] == 12 * own  # a gradient and two moments
    assert parts["activations of a pass"] == 2 * 16 * 3 * block
    assert parts["predictions of a pass"] == LOGIT_BYTES + 2 * 16 * 32 * 2
    assert parts["peak"] == sum(list(parts.values())[:5]) + RUNTIME_BYTES
    # 4 windows, 2 copies, 8 masked tokens each, of 256 tokens and the rest
    assert parts["held-out predictions, in host memory"] == 4 * 2 * 8 * (8 * 256 + 4)


def test_what_lowers_it(tiny_model):
    student, teacher = tiny_model(mlp_hidden_size=24), tiny_model()
    whole = predict(student, teacher, train__method="full")
    again = predict(student, teacher, train__method="full", train__checkpointing=True)
    block = saved_bytes(Adapter(student).blocks[0], FP32)
    assert again["activations of a pass"] == 2 * 16 * (3 * 32 * 4 + block)
    offloaded = predict(student, teacher, train__method="full", teacher__offload=True)
    assert offloaded["teacher weights"] == 2 * 2048 * 32 < whole["teacher weights"]  # the embedding is the largest


def test_numbers_of_low_rank_updates(tiny_model):
    student = Adapter(tiny_model(mlp_hidden_size=24))
    squares, wide = 4 * (32 + 32), 3 * (32 + 24)
    assert lora_numbers(student, config(train__rank=2)) == 3 * 2 * (squares + wide)
    assert lora_numbers(student, config(train__rank=2, train__targets=["query", "down"])) == 3 * 2 * (64 + 56)
    updates = predict(student.model, student.model, train__rank=2)["gradients and optimiser"]
    assert updates == 16 * 3 * 2 * (squares + wide)


def test_a_dry_run_writes_nothing(tiny_checkpoint, text_path, tmp_path, capsys):
    dense = tiny_checkpoint()
    keys = ["data.length=16", "train.batch=8", "data.held_out=4"]
    command = ["recover", str(dense), "--teacher", str(dense), "--out", str(tmp_path / "out"), "--data", str(text_path)]
    command += ["--tokens", "1280", "--device", "cpu", "--dry-run", *(f"--set={key}" for key in keys)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "10 steps over 1,280 tokens, 1.0 times each window" in shown and "peak" in shown
    assert "checkpoints, on disk" in shown and "teacher's predictions" not in shown
    assert "Nothing was written." in shown and not list(tmp_path.glob("out*"))
    assert main([*command, "--teacher-cache", str(tmp_path / "cache")]) == 0
    assert "teacher's predictions, on disk" in capsys.readouterr().out and not (tmp_path / "cache").exists()


def test_bytes_of_a_folder(tiny_model):
    student = Adapter(tiny_model(mlp_hidden_size=24))
    whole, updates = student.model.num_parameters(), 3 * 2 * (4 * (32 + 32) + 3 * (32 + 24))
    full, lora = config(train__method="full"), config(train__rank=2)
    assert folder_bytes(student, full, FP32, steps=100) == 3 * 12 * whole  # weights and two moments, three times
    assert folder_bytes(student, lora, BF16, steps=100) == 3 * 12 * updates  # updates are fp32
    assert folder_bytes(student, lora, BF16, steps=2) == 2 * 12 * updates
    blocks = 3 * (4 * 32 * 32 + 3 * 32 * 24 + 2 * 32)  # projections and norms
    assert folder_bytes(student, config(blocks__tokens=64), BF16, steps=0) == 2 * blocks
    once = config(train__method="full", train__evaluations=1)  # and a checkpoint that a signal asks for
    assert folder_bytes(student, once, FP32, steps=9) == 2 * 12 * whole
    assert folder_bytes(student, full, BF16, steps=100) == 3 * 6 * whole  # so are its moments


@pytest.mark.parametrize("length", [16, 32])
def test_activations_grow_with_the_pass(tiny_model, length):
    one, two = (
        predict(tiny_model(), tiny_model(), data__length=length, train__pass_windows=windows) for windows in (1, 2)
    )
    assert two["activations of a pass"] == 2 * one["activations of a pass"]


@pytest.mark.parametrize("offload", [False, True])
def test_an_int8_teacher_is_predicted_as_it_is_held(tiny_model, offload):
    teacher = tiny_model(mlp_hidden_size=4096)
    one = predict(teacher, teacher, teacher__int8=True, teacher__offload=offload)["teacher weights"]
    largest = 2 * 4096 * 32  # of a projection while it computes, in bf16
    if offload:
        assert one == 4096 * 32 + 4 * 4096 + largest  # of gate and up, with their scales
    else:
        held = sum(parameter.nbytes for parameter in to_int8(teacher, BF16).parameters())
        assert one == held + largest
