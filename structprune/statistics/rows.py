"""What an arm looks at: the token rows of a calibration set and their weights (docs/methods.md section 2)."""

from dataclasses import dataclass
from typing import Callable, Iterable

import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.adapter import Adapter
from structprune.models.transfer import send
from structprune.statistics.capture import MassMeter
from structprune.statistics.sinks import keep_weights

Track = Callable[[Iterable, str], Iterable]


Observe = Callable[[torch.Tensor], None]  # is shown attention mass (..., T) that sink weights are made from


def unobserved(mass: torch.Tensor) -> None:
    """The hook that looks at no mass."""


def untracked(items: Iterable, title: str) -> Iterable:
    """The progress hook that shows nothing."""
    return items


@dataclass(frozen=True)
class Rows:
    """Sequences an arm feeds to the model.

    Attributes:
        ids: (R, T) int64.
        weight: (R, T) fp32 ω, or None where every row counts fully.
        masked: (R, T) bool, tokens that are masked in `ids`.
        copies: sequences per window, which are neighbours.
    """

    ids: torch.Tensor
    weight: torch.Tensor | None
    masked: torch.Tensor
    copies: int

    def part(self, rows: slice, device: torch.device) -> torch.Tensor | None:
        """The weights of some sequences on a device, (b, T)."""
        return None if self.weight is None else send(self.weight[rows], device)


def needs_sinks(arm: str | None, sink: SinkSettings) -> bool:
    """Whether rows of an arm are weighted by their sinks."""
    return arm is not None and arm.endswith("+sink") and sink.policy != "none"


def arm_ids(calibration: Calibration, arm: str) -> torch.Tensor:
    """(N, R, T) ids an arm runs: the clean windows once, or their S noisy copies."""
    return calibration.input_ids[:, None] if arm.startswith("clean") else calibration.noisy_ids


def arm_weights(mass: torch.Tensor, arm: str, sink: SinkSettings) -> torch.Tensor:
    """Row weights of a sink arm from the mass (N, S, T): per level, or for clean rows their mean over it (N, 1, T)."""
    weights = keep_weights(mass, sink)  # (N, S, T)
    return weights.mean(1, keepdim=True) if arm.startswith("clean") else weights


def arm_rows(calibration: Calibration, arm: str, sink: SinkSettings, mass: torch.Tensor | None, mask_id: int) -> Rows:
    """The rows of an arm.

    Args:
        mass: (N, S, T) attention mass on the noisy copies; needed by the sink arms only.
    """
    ids = arm_ids(calibration, arm)  # (N, R, T)
    weight = arm_weights(mass, arm, sink).flatten(0, 1) if needs_sinks(arm, sink) else None  # (N*R, T)
    masked = (ids == mask_id) & (calibration.input_ids[:, None] != mask_id)  # (N, R, T)
    return Rows(ids.flatten(0, 1), weight, masked.flatten(0, 1), ids.shape[1])


@torch.inference_mode()
def mass_of(adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    """Attention mass of some sequences over all layers and heads, (b, T) -> (b, T) fp32 on the model's device.

    The pass ends where the last block's attention begins.
    """
    x = adapter.model.embedding(send(ids, adapter.device))  # (b, T, C)
    rotary = adapter.model.rotary(ids.shape[1], adapter.device)
    with MassMeter().on([block.core for block in adapter.blocks]) as meter:
        for block in adapter.blocks[:-1]:
            x = block.module(x, rotary)  # (b, T, C)
        adapter.blocks[-1].module.mix(x, rotary)
    return meter.take()


def measure_mass(
    adapter: Adapter,
    calibration: Calibration,
    batch: int = 1,
    track: Track = untracked,
    observe: Observe = unobserved,
) -> torch.Tensor:
    """Attention mass on every noisy copy: (N, S, T) fp32 on CPU.

    Args:
        batch: sequences per forward pass.
        observe: is shown all of it.
    """
    noisy = calibration.noisy_ids.flatten(0, 1)  # (N*S, T)
    starts = track(range(0, len(noisy), batch), "attention mass")
    # brought to the host at once: batch by batch the device would stand still at the end of every pass
    mass = torch.cat([mass_of(adapter, noisy[start : start + batch]) for start in starts]).cpu()  # (N*S, T)
    observe(mass)
    return mass.view(calibration.noisy_ids.shape)
