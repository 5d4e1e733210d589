"""Moments of what every consumer reads, on any arm: one forward per batch where its inputs can be held, else two."""

import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.adapter import Adapter
from structprune.models.transfer import send
from structprune.statistics.activations import Moments, merge_moments, moments
from structprune.statistics.capture import MassMeter, consumers, watch_inputs
from structprune.statistics.rows import Observe, Track, arm_ids, arm_weights, needs_sinks, unobserved, untracked

Key = tuple[int, str]  # (block index, consumer role)


def held_bytes(adapter: Adapter, sequences: int, length: int) -> int:
    """Bytes of every consumer's input for `sequences` sequences, as held until their sink weights are known."""
    size = adapter.model.embedding.weight.element_size()
    return sequences * length * size * sum(module.in_features for module in consumers(adapter.blocks).values())


@torch.inference_mode()
def consumer_moments(
    adapter: Adapter,
    calibration: Calibration,
    arm: str,
    sink: SinkSettings,
    windows: int = 1,
    budget: int = 2**33,
    track: Track = untracked,
    observe: Observe = unobserved,
) -> dict[Key, Moments]:
    """Moments of the inputs of all consumers over the rows of `arm`.

    The noisy arms' sink weights are known only when a forward pass has ended: within `budget` bytes every consumer's
    input is held until then, beyond it the batch is run twice. Both give the same numbers.

    Args:
        windows: windows per batch (times S copies, so that a policy has all levels of a window before it).
        observe: is shown the mass that sink weights are made from, window by window.
    Returns:
        (block, role) -> `Moments` of that consumer's input features.
    """
    totals: dict[Key, Moments] = {}

    def add(key: Key, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        new = moments(x, weight)
        totals[key] = merge_moments(totals[key], new) if key in totals else new

    def weigh(noisy: torch.Tensor) -> torch.Tensor:
        mass = _mass(adapter, noisy)  # (b, S, T)
        observe(mass)
        return arm_weights(mass, arm, sink).flatten(0, 1)  # (b*R, T)

    ids, linears = arm_ids(calibration, arm), consumers(adapter.blocks)
    hold = held_bytes(adapter, windows * calibration.levels, calibration.length) <= budget
    for start in track(range(0, len(ids), windows), f"moments ({arm})"):
        noisy = calibration.noisy_ids[start : start + windows]  # (b, S, T)
        part = ids[start : start + windows]  # (b, R, T)
        if needs_sinks(arm, sink) and arm.startswith("masked") and hold:
            held: dict[Key, torch.Tensor] = {}
            with watch_inputs(linears, held.__setitem__):
                weight = weigh(noisy)  # (b*R, T)
            for key in list(held):
                add(key, held.pop(key), weight)
            continue
        weight = weigh(noisy) if needs_sinks(arm, sink) else None  # (b*R, T)
        with watch_inputs(linears, lambda key, x: add(key, x, weight)):
            adapter.model.encode(send(part.flatten(0, 1), adapter.device))
    return totals


def _mass(adapter: Adapter, noisy: torch.Tensor) -> torch.Tensor:
    """One forward over (b, S, T) noisy copies -> their attention mass (b, S, T)."""
    with (meter := MassMeter()).on([block.core for block in adapter.blocks]):
        adapter.model.encode(send(noisy.flatten(0, 1), adapter.device))
    return meter.take().view(noisy.shape)
