"""What a recovery computes, predicted from the shapes of both models.

Products of matrices only, an addition and a multiplication being two operations. Training takes three forward passes'
worth of them: the pass, the gradient of what went in, and that of the weights.
"""

from structprune.bench.recovery_memory import lora_numbers
from structprune.levels.cost import RATE
from structprune.models.adapter import Adapter
from structprune.recovery.blocks import row_counts
from structprune.recovery.settings import RecoverConfig
from structprune.recovery.trainer import steps_of

MASKED = 0.5  # mean share of the tokens that are predicted


def recovery_cost(student: Adapter, teacher: Adapter, config: RecoverConfig, steps: int | None = None) -> dict:
    """Operations by part, and seconds at `RATE`, as plain data.

    Args:
        student, teacher: adapters of meta models.
        steps: optimiser steps of the second stage; None: what `train.tokens` are enough for.
    """
    data, train = config.data, config.train
    steps = steps_of(train.tokens, config) if steps is None else steps
    learnt, judged = (count * data.length for count in (steps * train.batch, data.held_out * data.noise))
    first = row_counts(config)[0] * data.length
    measured = 2 + bool(first) + min(train.evaluations, steps)  # before, between both stages, during and after
    both = forward(student, data.length) + predicted(student), forward(teacher, data.length) + predicted(teacher)
    parts = {
        "block by block": _blocks(student, teacher, config, first, judged) if first else 0.0,
        "teacher": learnt * both[1] * (config.loss.kl > 0),
        "student": learnt * _learning(student, config),
        "held-out text": judged * (measured * both[0] + both[1]),
    }
    parts = {name: operations for name, operations in parts.items() if operations}
    return {"operations": parts, "seconds": {name: each / RATE for name, each in parts.items()}, "rate": RATE}


def forward(model: Adapter, length: int) -> float:
    """Operations of all blocks' forward pass, for a token of a window of so many."""
    copies = model.model.layout.copies
    return copies * (_weights(model) + _attention(model, copies * length))


def predicted(model: Adapter) -> float:
    """Operations of the LM head, for a token, which is masked with probability 1/2."""
    return MASKED * 2.0 * model.vocabulary * model.hidden_size


def _weights(model: Adapter) -> float:
    return 2.0 * sum(block[role].weight.numel() for block in model.blocks for role in block.names)


def _attention(model: Adapter, length: int) -> float:
    """Of a token's products with the keys and values of its window."""
    return 4.0 * length * model.head_dim * sum(block.widths.query_heads for block in model.blocks)


def _learning(student: Adapter, config: RecoverConfig) -> float:
    """Operations of a step for a token; the LM head runs once more in the backward pass (`student.loss_of`)."""
    copies = student.model.layout.copies
    weights, head = copies * _weights(student), predicted(student)
    attention = copies * _attention(student, copies * config.data.length)
    again = config.train.checkpointing * (weights + attention)
    if config.train.method == "full":
        return 3 * weights + 3 * attention + 4 * head + again
    updates = 2.0 * copies * lora_numbers(student, config)
    return 2 * weights + 3 * attention + 3 * head + (3 + config.train.checkpointing) * updates + again


def _blocks(student: Adapter, teacher: Adapter, config: RecoverConfig, learnt: int, judged: int) -> float:
    """Operations of the first stage: both streams pass every block once, and the student's learns on the way."""
    own, dense = (forward(model, config.data.length) for model in (student, teacher))
    return learnt * 3 * own + judged * 2 * own + (learnt + judged) * (own + dense)
