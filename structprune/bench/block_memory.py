"""Predicted peak memory of a recovery's first stage, block by block, from the shapes of both models."""

import torch

from structprune.bench.memory import RUNTIME_BYTES
from structprune.bench.recovery_memory import held_bytes, numbers
from structprune.models.adapter import Adapter, BlockView
from structprune.recovery.blocks import block_steps, block_tokens, row_counts
from structprune.recovery.settings import RecoverConfig
from structprune.statistics.gradients import saved_bytes

FLOAT = 4  # bytes of a weight that is learnt, of its gradient, and of each of AdamW's two moments


def block_plan(
    student: Adapter, teacher: Adapter, config: RecoverConfig, dtypes: tuple[torch.dtype, torch.dtype]
) -> dict | None:
    """Steps, tokens and memory of the stage, as plain data; None without one. Arguments as `block_memory`."""
    if not config.blocks.tokens:
        return None
    memory = block_memory(student, teacher, config, dtypes)
    return {"steps": block_steps(config), "tokens": block_tokens(config), "memory": memory}


def block_memory(
    student: Adapter, teacher: Adapter, config: RecoverConfig, dtypes: tuple[torch.dtype, torch.dtype]
) -> dict[str, int]:
    """Bytes by part, and the sum of those on the device, its peak.

    Args:
        student, teacher: adapters of meta models. dtypes: of their weights in memory.
    """

    def visitor(block: BlockView) -> int:
        """Bytes of a dense block, and of the projection that int8 makes whole while it computes."""
        whole = max(block[role].weight.numel() for role in block.names) * dtypes[1].itemsize
        return sum(held[id(weight)] for weight in block.module.parameters()) + whole * config.teacher.int8

    length = config.data.length * student.model.layout.copies  # tokens of a row
    tokens = config.train.pass_windows * length
    rows = sum(row_counts(config)) * length  # tokens of a stream
    offload = config.blocks.offload, config.blocks.offload or config.teacher.offload
    held = held_bytes(teacher, config.teacher, dtypes[1])
    sizes = student.model.num_parameters() * dtypes[0].itemsize, sum(held.values())
    whole, visiting = 0, 0
    for adapter, size, dtype, on_host in zip((student, teacher), sizes, dtypes, offload, strict=True):
        if on_host:  # it brings its embedding
            visiting = max(visiting, adapter.model.embedding.weight.numel() * dtype.itemsize)
        else:
            whole += size
    parts = {
        "weights of models": whole + visiting,
        "a block of the teacher": max(map(visitor, teacher.blocks)),
        "a block, gradients and optimiser": max(map(numbers, student.blocks)) * 4 * FLOAT,
        "activations of a pass": tokens * max(saved_bytes(block, torch.float32) for block in student.blocks),
    }
    parts["peak"] = sum(parts.values()) + RUNTIME_BYTES
    width = student.hidden_size * sum(dtype.itemsize for dtype in dtypes)
    parts["residual streams, on the host"] = rows * width
    return parts
