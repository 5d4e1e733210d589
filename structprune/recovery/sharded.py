"""FSDP2: weights, gradients and optimiser of a student in parts, one in each process.

Asked for by `accelerate launch --use_fsdp`. What is no forward pass of the whole student (held-out text, the end) needs
its weights whole.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from structprune.errors import UserError

ASKED, VERSION, OFFLOAD = "ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS"  # set by accelerate's launcher
# the student's blocks are the units; checkpoints hold whole weights, so that they can be checked as others are
ARGUMENTS = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}


def is_sharded(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher was told to shard."""
    return environment.get(ASKED, "false").lower() == "true"


def check_sharded(
    method: str, masked: bool, processes: int, windows: int, environment: Mapping[str, str] = os.environ
) -> None:
    """Raise UserError for trainings that cannot be sharded.

    Args:
        method: `train.method`. masked: the student has zeros that must stay.
        windows: held-out ones; a process without any would not take part in what all do with the weights.
    """
    if processes == 1:
        raise UserError("FSDP has nothing to share in one process: raise --num_processes, or leave out --use_fsdp")
    remedy = "leave out --use_fsdp: each process then holds the whole student"
    if method == "lora":
        raise UserError(f"FSDP shards what is trained, which is little with train.method = lora: {remedy}")
    if masked:
        raise UserError(f"zeros of a masked checkpoint cannot be kept under FSDP: {remedy}")
    if windows < processes:
        raise UserError(
            f"data.held_out = {windows} leaves some of {processes} processes without a window, which FSDP needs:"
            f" raise it to {processes}"
        )
    if environment.get(VERSION, "2") != "2":
        raise UserError(f"FSDP version {environment[VERSION]} is not supported: launch with --fsdp_version 2")
    if environment.get(OFFLOAD, "false").lower() == "true":
        raise UserError("FSDP with weights in host memory is not supported: leave out --fsdp_offload_params")


def check_apart(student: Any) -> None:
    """Raise UserError for a student whose head follows its embedding: as parts of their own they would come apart."""
    if student.followers:
        reason = "FSDP shards embedding and head apart, and this model's head follows its embedding"
        raise UserError(f"{reason}: leave out --use_fsdp")


def shard_on_cpus(trainer: Any) -> None:
    """Turn FSDP on in a Trainer of processes that compute on CPUs, where accelerate takes its plugin unused."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        PartialState().distributed_type = DistributedType.FSDP  # which each new state reads
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type="FULL_STATE_DICT", auto_wrap_policy="TRANSFORMER_BASED_WRAP",
            cpu_ram_efficient_loading=False, reshard_after_forward=True,
        )  # fmt: skip
        trainer.is_fsdp_enabled = True


@contextmanager
def whole_weights(student: nn.Module) -> Iterator[None]:
    """While open, every process has all weights of a student, which may run in parts of its own choice, without
    gradients; nothing changes for one that is not sharded."""
    from torch.distributed.fsdp import FSDPModule  # takes a second

    units = [module for module in student.modules() if isinstance(module, FSDPModule)]
    if not units:
        yield
        return
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        early = (*student.blocks, student.embedding)  # type: ignore[misc]  # the rest is read again at once, backwards
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit in early, recurse=False)


def whole_state(student: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with whole tensors, in every process; all must call this."""
    from torch.distributed.tensor import DTensor

    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in student.state_dict().items()
    }
