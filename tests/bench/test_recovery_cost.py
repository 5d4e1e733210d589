"""The predicted operations of a recovery: against those that models run, and by hand."""

import pytest
import torch

from structprune.bench.macs import counted_macs
from structprune.bench.recovery_cost import forward, predicted, predicted_next, recovery_cost
from structprune.levels.cost import RATE
from structprune.models.adapter import Adapter
from structprune.recovery.held_out import HeldOutStudy
from structprune.recovery.lora import add_adapters
from structprune.recovery.settings import LossSettings, RecoverConfig
from structprune.recovery.student import Lesson, learning
from structprune.recovery.text import RecoveryText
from structprune.workers import Workers
from tests.tiny_values import MASK_ID

LENGTH = 16
MIXTURES = ["llada-moe", "llada2"]


def cost(student, teacher, **changes):
    keys = {
        "data.length": LENGTH, "data.held_out": 4, "data.noise": 2, "train.batch": 2, "train.tokens": 320,
        "train.method": "full", "train.evaluations": 5,
    }  # fmt: skip
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return recovery_cost(Adapter(student), Adapter(teacher), RecoverConfig.load(overrides=keys))["operations"]


def learnt_pass(model, **settings) -> int:
    """MACs of the forward pass of a loss over three windows, of which every other token is masked."""
    ids = torch.randint(0, 90, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    noisy = ids.clone()
    noisy[:, ::2] = MASK_ID
    lesson = Lesson(LossSettings(kl=0, cross_entropy=1, **settings), None, 0.5)
    with counted_macs(model) as macs, torch.no_grad(), learning(model):
        model(input_ids=ids, noisy_ids=noisy, rate=torch.full((3,), 0.5), lesson=lesson)
    return macs.total


@pytest.mark.parametrize("family, changes", [("llada", {"mlp_hidden_size": 24}), *((name, {}) for name in MIXTURES)])
def test_a_forward_pass_is_what_a_model_runs(tiny_model, family, changes):
    model = tiny_model(family, **changes)
    adapter = Adapter(model)
    counted = 3 * LENGTH * (forward(adapter, LENGTH) + predicted(adapter))
    assert counted == 2 * learnt_pass(model)


def test_next_tokens_too_where_they_are_learnt(tiny_model):
    model = tiny_model("nemotron-labs")
    adapter = Adapter(model)
    both = forward(adapter, LENGTH) + predicted(adapter) + predicted_next(adapter, LENGTH)
    assert 3 * LENGTH * both == 2 * learnt_pass(model, causal=0.5)
    following = 320 * predicted_next(adapter, LENGTH)
    parts, plain = (cost(model, model, loss__causal=causal) for causal in (0.5, 0))
    assert parts["teacher"] - plain["teacher"] == following and parts["held-out text"] == plain["held-out text"]
    assert parts["student"] - plain["student"] == 4 * following  # the pass, again in the backward pass, two gradients
    low, alone = (cost(model, model, loss__causal=causal, train__method="lora") for causal in (0.5, 0))
    assert low["student"] - alone["student"] == 3 * following  # no gradient of the head's weights


def test_held_out_text_of_a_causal_model_is_what_it_runs(tiny_model):
    """Up to what the noise masks, and the last block, which runs at predicted positions alone."""
    model = tiny_model("nemotron-labs", num_hidden_layers=24)
    text = torch.randint(0, 90, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    with counted_macs(model) as macs:
        HeldOutStudy(model, RecoveryText(text, text), 2, 0, Workers())
    parts = cost(model, model, train__evaluations=1, train__tokens=32)
    assert parts["held-out text"] / 4 == pytest.approx(2 * macs.total, rel=0.05)  # before, then, after, and the teacher


@pytest.mark.parametrize("family", MIXTURES)
def test_updates_of_the_experts_that_a_token_gets(tiny_model, family):
    pytest.importorskip("peft")
    model = tiny_model(family)
    changes = {"train__method": "lora", "train__checkpointing": True}
    one, two = (cost(model, model, train__rank=rank, **changes)["student"] for rank in (1, 2))
    plain = learnt_pass(model)
    settings = RecoverConfig.load(overrides={"train.rank": 1}).train
    add_adapters(model, settings, 0)
    # a row more of rank: four passes of 320 tokens, where three windows ran one
    assert two - one == 4 * (320 / (3 * LENGTH)) * 2 * (learnt_pass(model) - plain)


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
