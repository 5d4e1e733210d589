"""Where a run computes and what it may hold: device, streaming, dtype and memory budget, resolved once."""

from dataclasses import dataclass
from typing import Literal

import torch

from structprune.config import MemorySettings, ModelSettings
from structprune.errors import UserError
from structprune.models.loading import as_dtype
from structprune.models.placement import pick_device


@dataclass(frozen=True)
class Resources:
    """What a run has to work with."""

    device: torch.device  # where forward passes compute
    # where weights stay, and each layer's are streamed from to the device while it computes: True is host memory
    offload: bool | Literal["disk"] = False
    overlap: bool = False  # copy hidden states and streamed weights while others are computed
    dtype: torch.dtype | None = None  # of the weights in memory; None: float32 on CPU, else the checkpoint's own
    budget: int = 8 * 10**9  # bytes of hidden states and statistics before they go to files or are computed again

    @property
    def accelerator(self) -> bool:
        return self.device.type != "cpu"

    @property
    def stream_target(self) -> torch.device | None:
        """The device to stream weights to; None where they stay where they are."""
        return self.device if self.offload else None

    @property
    def on_disk(self) -> bool:
        """Whether weights stay in their files."""
        return self.offload == "disk"

    @property
    def home(self) -> torch.device:
        """Where weights are loaded."""
        return torch.device("cpu") if self.offload else self.device

    def weight_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Dtype of the weights in memory, given the checkpoint's."""
        return self.dtype or (stored if self.accelerator else torch.float32)


def resolve_resources(model: ModelSettings, memory: MemorySettings, dry_run: bool = False) -> Resources:
    """Resources from the settings.

    Args:
        dry_run: the device need not be on this machine.
    Raises:
        UserError: an unknown or absent device or dtype, or streaming without an accelerator.
    """
    device = pick_device(model.device, absent=dry_run)
    if memory.offload is True and device.type == "cpu":
        raise UserError(
            "memory.offload streams weights to an accelerator, and the device is cpu: leave it off, or set it to disk"
        )
    if memory.offload == "disk" and model.allow_pickle:
        raise UserError(
            "memory.offload = disk reads safetensors files: leave out model.allow_pickle, and convert .bin shards first"
        )
    dtype = as_dtype(model.dtype)
    return Resources(device, memory.offload, memory.overlap, dtype, int(memory.budget_gb * 1e9))
