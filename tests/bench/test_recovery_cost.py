"""The predicted operations of a recovery: against those that models run, and by hand."""

import pytest
import torch

from structprune.bench.macs import counted_macs
from structprune.bench.recovery_cost import forward, predicted, recovery_cost
from structprune.levels.cost import RATE
from structprune.models.adapter import Adapter
from structprune.recovery.settings import RecoverConfig

LENGTH = 16


def cost(student, teacher, **changes):
    keys = {
        "data.length": LENGTH, "data.held_out": 4, "data.noise": 2, "train.batch": 2, "train.tokens": 320,
        "train.method": "full", "train.evaluations": 5,
    }  # fmt: skip
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return recovery_cost(Adapter(student), Adapter(teacher), RecoverConfig.load(overrides=keys))["operations"]


def test_a_forward_pass_is_what_a_model_runs(tiny_model):
    model = tiny_model(mlp_hidden_size=24)
    with counted_macs(model) as macs, torch.no_grad():
        model(torch.zeros(3, LENGTH, dtype=torch.long))
    adapter = Adapter(model)
    counted = 3 * LENGTH * (forward(adapter, LENGTH) + 2 * predicted(adapter))  # here all tokens are predicted
    assert counted == 2 * macs.total


def test_parts_by_hand(tiny_model):
    student, teacher = tiny_model(mlp_hidden_size=24), tiny_model()
    own, theirs = (forward(Adapter(model), LENGTH) for model in (student, teacher))
    head = 2048 * 32  # half of two operations each
    parts = cost(student, teacher)
    assert list(parts) == ["teacher", "student", "held-out text"]
    assert parts["student"] == 320 * (3 * own + 4 * head) and parts["teacher"] == 320 * (theirs + head)
    assert parts["held-out text"] == 4 * 2 * LENGTH * (7 * (own + head) + theirs + head)  # before, 5 times, after
    first = cost(student, teacher, blocks__tokens=64)["block by block"]
    assert first == 64 * 3 * own + 128 * 2 * own + (64 + 128) * (own + theirs)


def test_what_changes_it(tiny_model):
    student, teacher = tiny_model(mlp_hidden_size=24), tiny_model()
    whole, forwards = cost(student, teacher), forward(Adapter(student), LENGTH)
    assert "teacher" not in cost(student, teacher, loss__kl=0, loss__cross_entropy=1)
    again = cost(student, teacher, train__checkpointing=True)
    assert again["student"] - whole["student"] == 320 * forwards
    low = cost(student, teacher, train__method="lora", train__rank=1)
    assert 0.6 * whole["student"] < low["student"] < whole["student"] and low["teacher"] == whole["teacher"]
    parts = recovery_cost(
        Adapter(student), Adapter(teacher), RecoverConfig.load(overrides={"train.tokens": 320_000}), 0
    )
    assert list(parts["operations"]) == ["held-out text"]
    assert parts["seconds"]["held-out text"] == pytest.approx(parts["operations"]["held-out text"] / RATE)


def test_rows_that_hold_clean_text_too_cost_twice_the_weights(tiny_model):
    """A block diffusion model runs a noisy window and its clean text, which attend to each other."""
    single, pair = (Adapter(tiny_model(family)) for family in ("a2d-qwen3", "sdar"))
    weights = 2 * sum(block[role].weight.numel() for block in single.blocks for role in block.names)
    assert weights == 2 * sum(block[role].weight.numel() for block in pair.blocks for role in block.names)
    attention = forward(single, 16) - weights
    assert attention > 0 and forward(pair, 16) == 2 * weights + 4 * attention
