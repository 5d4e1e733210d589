"""What an arm looks at: the token rows of a calibration set and their weights (METHODS.md section 2)."""

from dataclasses import dataclass
from typing import Callable, Iterable

import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.adapter import Adapter
from structprune.statistics.capture import MassMeter
from structprune.statistics.sinks import keep_weights

Track = Callable[[Iterable, str], Iterable]


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
        return None if self.weight is None else self.weight[rows].to(device)


def needs_sinks(arm: str | None) -> bool:
    return arm is not None and arm.endswith("+sink")


def arm_ids(calibration: Calibration, arm: str) -> torch.Tensor:
    """(N, R, T) ids an arm runs: the clean windows once, or their S noisy copies."""
    return calibration.input_ids[:, None] if arm.startswith("clean") else calibration.noisy_ids


def arm_weights(mass: torch.Tensor, arm: str, sink: SinkSettings) -> torch.Tensor:
    """Row weights of a sink arm from the mass (N, S, T): per level, or for clean rows their mean over them (N, 1, T)."""
    weights = keep_weights(mass, sink)  # (N, S, T)
    return weights.mean(1, keepdim=True) if arm.startswith("clean") else weights


def arm_rows(calibration: Calibration, arm: str, sink: SinkSettings, mass: torch.Tensor | None, mask_id: int) -> Rows:
    """The rows of an arm.

    Args:
        mass: (N, S, T) attention mass on the noisy copies; needed by the sink arms only.
    """
    ids = arm_ids(calibration, arm)  # (N, R, T)
    weight = arm_weights(mass, arm, sink).flatten(0, 1) if needs_sinks(arm) else None  # (N*R, T)
    masked = (ids == mask_id) & (calibration.input_ids[:, None] != mask_id)  # (N, R, T)
    return Rows(ids.flatten(0, 1), weight, masked.flatten(0, 1), ids.shape[1])


@torch.inference_mode()
def measure_mass(adapter: Adapter, calibration: Calibration, batch: int = 1, track: Track = untracked) -> torch.Tensor:
    """Attention mass on every noisy copy, over all layers and heads: (N, S, T) fp32 on CPU.

    Args:
        batch: sequences per forward pass, which ends where the last block's attention begins.
    """
    noisy, meter, blocks = calibration.noisy_ids.flatten(0, 1), MassMeter(), adapter.blocks  # (N*S, T)
    mass = torch.zeros(noisy.shape, dtype=torch.float32)  # (N*S, T)
    rotary = adapter.model.rotary(noisy.shape[1], adapter.device)
    with meter.on([block.core for block in blocks]):
        for start in track(range(0, len(noisy), batch), "attention mass"):
            x = adapter.model.embedding(noisy[start : start + batch].to(adapter.device))  # (b, T, C)
            for block in blocks[:-1]:
                x = block.module(x, rotary)  # (b, T, C)
            blocks[-1].module.mix(x, rotary)
            mass[start : start + batch] = meter.take().cpu()
    return mass.view(calibration.noisy_ids.shape)
