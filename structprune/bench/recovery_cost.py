"""What a recovery computes, predicted from the shapes of both models.

Products of matrices only, an addition and a multiplication being two operations. Training takes three forward passes'
worth of them: the pass, the gradient of what went in, and that of the weights. Of a mixture those experts count that a
token gets.
"""

from structprune.bench.recovery_memory import lora_sizes
from structprune.levels.cost import RATE
from structprune.models.adapter import Adapter
from structprune.recovery.blocks import row_counts
from structprune.recovery.settings import RecoverConfig
from structprune.recovery.trainer import steps_of
from structprune.structured.sizes import active_share, active_weights

MASKED = 0.5  # mean share of the tokens that are predicted


def recovery_cost(student: Adapter, teacher: Adapter, config: RecoverConfig, steps: int | None = None) -> dict:
    """Operations by part, and seconds at `RATE`, as plain data.

    Args:
        student, teacher: adapters of meta models.
        config: with the weight of the causal loss, where the model is causal too (`checks.with_causal`).
        steps: optimiser steps of the second stage; None: what `train.tokens` are enough for.
    """
    data, train = config.data, config.train
    steps = steps_of(train.tokens, config) if steps is None else steps
    learnt, judged = (count * data.length for count in (steps * train.batch, data.held_out * data.noise))
    first = row_counts(config)[0] * data.length
    measured = 2 + bool(first) + min(train.evaluations, steps)  # before, between both stages, during and after
    lesson = forward(teacher, data.length) + predicted(teacher) + _following(teacher, config)
    parts = {
        "block by block": _blocks(student, teacher, config, first, judged) if first else 0.0,
        "teacher": learnt * lesson * (config.loss.kl > 0),
        "student": learnt * _learning(student, config),
        "held-out text": measured * _measuring(student, config) + _measuring(teacher, config),
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


def predicted_next(model: Adapter, length: int) -> float:
    """Operations of the LM head, for a token of a window of which all but the first are predicted causally."""
    return (1 - 1 / length) * 2.0 * model.vocabulary * model.hidden_size


def _following(model: Adapter, config: RecoverConfig) -> float:
    """Operations of the causal loss for a token: its blocks' pass is that of the noisy window."""
    return predicted_next(model, config.data.length) if config.loss.causal else 0.0


def _measuring(model: Adapter, config: RecoverConfig) -> float:
    """Operations of one measurement on the held-out text; a model that is causal too also reads it without noise."""
    data, length = config.data, config.data.length
    noisy = data.noise * (forward(model, length) + predicted(model))
    clean = _weights(model) + _attention(model, length) + predicted_next(model, length)
    return data.held_out * length * (noisy + clean * model.model.layout.causal)


def _weights(model: Adapter) -> float:
    return 2.0 * sum(active_weights(block) for block in model.blocks)


def _attention(model: Adapter, length: int) -> float:
    """Of a token's products with the keys and values of its window."""
    return 4.0 * length * model.head_dim * sum(block.widths.query_heads for block in model.blocks)


def _learning(student: Adapter, config: RecoverConfig) -> float:
    """Operations of a step for a token; the LM head runs once more in the backward pass (`student.loss_of`)."""
    copies = student.model.layout.copies
    weights, head = copies * _weights(student), predicted(student) + _following(student, config)
    attention = copies * _attention(student, copies * config.data.length)
    again = config.train.checkpointing * (weights + attention)
    if config.train.method == "full":
        return 3 * weights + 3 * attention + 4 * head + again
    updates = 2.0 * copies * sum(active_share(block, lora_sizes(block, config)) for block in student.blocks)
    return 2 * weights + 3 * attention + 3 * head + (3 + config.train.checkpointing) * updates + again


def _blocks(student: Adapter, teacher: Adapter, config: RecoverConfig, learnt: int, judged: int) -> float:
    """Operations of the first stage: both streams pass every block once, and the student's learns on the way."""
    own, dense = (forward(model, config.data.length) for model in (student, teacher))
    return learnt * 3 * own + judged * 2 * own + (learnt + judged) * (own + dense)
