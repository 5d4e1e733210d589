"""Predicted peak memory of a recovery, and what its folder takes on disk, from the shapes of both models."""

import torch

from structprune.bench.memory import RUNTIME_BYTES
from structprune.evaluation.fidelity import TOP
from structprune.models.adapter import Adapter, BlockView
from structprune.models.experts_structprune import role_and_part
from structprune.models.logits import LOGIT_BYTES
from structprune.recovery.settings import RecoverConfig, TeacherSettings
from structprune.statistics.gradients import saved_bytes

FLOAT = 4  # bytes of a gradient, and of each of AdamW's two moments
CHECKPOINTS = 3  # most at once: the best, the last, and the next while it is written
OUTCOME = 8  # bytes of a kept prediction: a token and its log-probability


def lora_numbers(student: Adapter, config: RecoverConfig) -> int:
    """Numbers in the low-rank updates of a student."""
    return sum(sum(lora_sizes(block, config).values()) for block in student.blocks)


def lora_sizes(block: BlockView, config: RecoverConfig) -> dict[str, int]:
    """Numbers in the low-rank updates of a block, by the role of what they update."""
    roles = [role for role in block.names if role_and_part(role)[0] in config.train.targets]
    return {role: config.train.rank * sum(block[role].weight.shape) for role in roles}


def held_bytes(teacher: Adapter, settings: TeacherSettings, dtype: torch.dtype) -> dict[int, int]:
    """Bytes of a teacher's weights as they are held, by their `id`.

    Args:
        dtype: of its computation.
    """
    whole = {id(p): p.numel() * dtype.itemsize for p in teacher.model.parameters()}
    if not settings.int8:
        return whole
    projections = [block[role].weight for block in teacher.blocks for role in block.names]
    return whole | {id(weight): weight.numel() + len(weight) * FLOAT for weight in projections}


def teacher_bytes(teacher: Adapter, settings: TeacherSettings, dtype: torch.dtype) -> int:
    """Bytes of a teacher's weights on its device: all of them, or the largest layer where they are streamed.

    Args:
        dtype: of its computation.
    """
    held = held_bytes(teacher, settings, dtype)
    if not settings.int8:
        return max(held.values()) if settings.offload else sum(held.values())
    projections = [block[role].weight for block in teacher.blocks for role in block.names]
    whole = {id(weight): weight.numel() * dtype.itemsize for weight in projections}  # of the one that computes
    if settings.offload:
        return max(max(held.values()), max(held[key] + size for key, size in whole.items()))
    return sum(held.values()) + max(whole.values())


def recovery_memory(
    student: Adapter, teacher: Adapter, config: RecoverConfig, dtypes: tuple[torch.dtype, torch.dtype]
) -> dict[str, int]:
    """Bytes by part, and their sum where both models are on one device.

    Args:
        student, teacher: adapters of meta models. dtypes: of their weights in memory.
    Returns:
        `peak` leaves out what stays in host memory: the teacher with `teacher.offload`, but for one layer, and the
        held-out predictions.
    """
    train, own = config.train, dtypes[0]
    tokens = train.pass_windows * config.data.length * student.model.layout.copies
    numbers = student.model.num_parameters()
    # updates are held in fp32 themselves
    learnt = numbers * 3 * FLOAT if train.method == "full" else lora_numbers(student, config) * 4 * FLOAT
    blocks = [saved_bytes(block, own) for block in student.blocks]
    once = len(blocks) * student.hidden_size * own.itemsize + max(blocks)
    parts = {
        "student weights": numbers * own.itemsize,
        # also where only the held-out text is measured with it
        "teacher weights": teacher_bytes(teacher, config.teacher, dtypes[1]),
        "gradients and optimiser": learnt,
        "activations of a pass": tokens * (once if train.checkpointing else sum(blocks)),
        "predictions of a pass": LOGIT_BYTES + tokens * teacher.hidden_size * dtypes[1].itemsize,
    }
    if config.loss.streams:  # the dense ones, and differences in fp32 for the backward pass
        parts["streams of a pass"] = tokens * (len(blocks) - 1) * student.hidden_size * (dtypes[1].itemsize + FLOAT)
    parts["peak"] = sum(parts.values()) + RUNTIME_BYTES
    held_out = config.data.held_out * config.data.noise * config.data.length // 2  # masked tokens, on average
    parts["held-out predictions, in host memory"] = held_out * (OUTCOME * TOP + FLOAT)
    return parts


def folder_bytes(student: Adapter, config: RecoverConfig, dtype: torch.dtype, steps: int) -> int:
    """Bytes on disk of a training's folder: checkpoints of what is learnt, with AdamW's two moments, and the
    blocks of a first stage.

    Args:
        student: adapter of a meta model. dtype: of its weights in memory. steps: of the second stage.
    """
    full = config.train.method == "full"
    learnt = student.model.num_parameters() if full else lora_numbers(student, config)
    checkpoint = learnt * 3 * (dtype.itemsize if full else FLOAT)  # moments are in the dtype of what is learnt
    blocks = sum(map(numbers, student.blocks)) * dtype.itemsize if config.blocks.tokens else 0
    return min(CHECKPOINTS, config.train.evaluations + 1, steps) * checkpoint + blocks  # a signal adds one


def numbers(block: BlockView) -> int:
    """Weights of a block."""
    return sum(parameter.numel() for parameter in block.module.parameters())
