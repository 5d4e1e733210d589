"""Latency of several models, measured interleaved in one run so that drift hits all of them alike."""

import time
from dataclasses import dataclass
from typing import Callable, Iterable

import torch

from structprune.models.adapter import Adapter
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device, synchronise

Clock = Callable[[], float]
QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Latency:
    """Seconds of one call, one entry per round.

    Attributes:
        seconds: in the order measured; entry i of two models of one run belong to the same round.
    """

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return self.quantile_ms(0.5)

    def quantile_ms(self, share: float) -> float:
        return 1e3 * torch.tensor(self.seconds, dtype=torch.float64).quantile(share).item()

    def quartiles_ms(self) -> dict[str, float]:
        low, middle, high = map(self.quantile_ms, QUARTILES)
        return {"median": middle, "p25": low, "p75": high}


def elapsed(call: Callable[[], object], device: torch.device, clock: Clock | None = None) -> float:
    """Seconds that `call` takes, its work on the device included.

    On CUDA between two events on the device's stream, so that the host's own delay in looking at a clock does not
    count; elsewhere, and where a clock is given, by the clock.
    """
    if device.type == "cuda" and clock is None:
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    clock = clock or time.perf_counter
    synchronise(device)
    start = clock()
    call()
    synchronise(device)
    return clock() - start


def interleaved(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warmup: int = 0,
    clock: Clock | None = None,
    track: Callable[[Iterable], Iterable] = lambda items: items,
) -> dict[str, Latency]:
    """Time every call in turn, `rounds` times.

    Every other round goes through them backwards, so that none always follows the same one.

    Args:
        calls: name -> what to time.
        warmup: untimed calls of each before.
        clock: seconds; for tests.
        track: wraps the iteration over rounds (progress).
    Returns:
        name -> `Latency`.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    synchronise(device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in track(range(rounds)):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            seconds[name].append(elapsed(calls[name], device, clock))
    return {name: Latency(tuple(values)) for name, values in seconds.items()}


def random_ids(model: DiffusionLM, batch: int, length: int) -> torch.Tensor:
    """Seeded ids (B, T) on the model's device, none of them the mask token."""
    adapter = Adapter(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(adapter.vocabulary - 1, (batch, length), generator=generator)  # (B, T)
    return (ids + (ids >= adapter.mask_id)).to(compute_device(model))


@torch.inference_mode()
def measure_latency(
    models: dict[str, DiffusionLM],
    length: int,
    batch: int = 1,
    rounds: int = 20,
    warmup: int = 3,
    clock: Clock | None = None,
    track: Callable[[Iterable], Iterable] = lambda items: items,
) -> dict[str, Latency]:
    """Time `model(ids)` (logits of all positions) of every model in turn, `rounds` times.

    Args:
        models: name -> model; all on one device, with one vocabulary.
        length: tokens per sequence T. batch: sequences per pass.
        warmup: untimed passes per model. The rest as for `interleaved`.
    Returns:
        name -> `Latency`.
    """
    first = next(iter(models.values()))
    ids = random_ids(first, batch, length)  # (B, T)
    calls = {name: (lambda model=model: model(ids)) for name, model in models.items()}
    return interleaved(calls, ids.device, rounds, warmup, clock, track)


def speedup(dense: Latency, pruned: Latency) -> dict[str, float]:
    """Median over rounds of dense / pruned time, with its quartiles."""
    before, after = (torch.tensor(side.seconds, dtype=torch.float64) for side in (dense, pruned))  # (n,)
    ratios = before / after  # (n,)
    low, middle, high = (ratios.quantile(share).item() for share in QUARTILES)
    return {"median": middle, "p25": low, "p75": high}


def ideal_share(speed: dict[str, float], macs: tuple[int, int]) -> dict[str, float] | None:
    """Share of the ideal saving that is reached: (1 - 1 / speed-up) / (share of the MACs removed).

    Args:
        speed: a speed-up with its quartiles, as from `speedup`.
        macs: of the dense and of the pruned model for the same work, attention and LM head counted.
    Returns:
        Of the median and of both quartiles; None where no MACs are removed.
    """
    removed = 1 - macs[1] / macs[0]
    return {name: (1 - 1 / value) / removed for name, value in speed.items()} if removed > 0 else None
