"""Latency of several models, measured in turns within one run so that drift affects all of them alike."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from structprune.models.adapter import Adapter
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device, synchronise

Clock = Callable[[], float]
Call = Callable[[], object]
QUARTILES = {"median": 0.5, "p25": 0.25, "p75": 0.75}


@dataclass(frozen=True)
class Timing:
    """How calls are timed.

    Attributes:
        rounds: timed calls of each.
        warmup: untimed calls of each before the first round.
        track: wraps the iteration over rounds (progress).
        clock: returns seconds; default `time.perf_counter`, on CUDA events. For tests.
    """

    rounds: int = 20
    warmup: int = 3
    track: Callable[[Iterable], Iterable] = lambda items: items
    clock: Clock | None = None


DEFAULT = Timing()


@dataclass(frozen=True)
class Latency:
    """Seconds of a call.

    Attributes:
        seconds: one entry per round; entries with the same index of two models belong to the same round.
    """

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return self.quartiles_ms()["median"]

    def quartiles_ms(self) -> dict[str, float]:
        return {name: 1e3 * value for name, value in quartiles(self.tensor()).items()}

    def tensor(self) -> torch.Tensor:
        """(rounds,) float64 seconds."""
        return torch.tensor(self.seconds, dtype=torch.float64)


def quartiles(values: torch.Tensor) -> dict[str, float]:
    """Median and quartiles of (n,) values as plain data."""
    return {name: values.quantile(share).item() for name, share in QUARTILES.items()}


def elapsed(call: Call, device: torch.device, clock: Clock | None = None) -> float:
    """Seconds that `call` takes, including its work on the device.

    On CUDA the time between two events on the device's stream, which excludes delays of the host; elsewhere, and where
    a clock is given, the clock's time.
    """
    if device.type == "cuda" and clock is None:
        stream = torch.cuda.current_stream(device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(stream)
        call()
        last.record(stream)
        last.synchronize()
        return first.elapsed_time(last) / 1e3
    clock = clock or time.perf_counter
    synchronise(device)
    start = clock()
    call()
    synchronise(device)
    return clock() - start


def interleaved(calls: Mapping[str, Call], device: torch.device, timing: Timing) -> dict[str, Latency]:
    """Time several calls in turns, so that drift of the machine affects all of them alike.

    Every other round runs in reverse order, so that no call always follows the same one.

    Args:
        calls: name -> what to time.
    Returns:
        name -> `Latency`.
    """
    for call in calls.values():
        for _ in range(timing.warmup):
            call()
    synchronise(device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in timing.track(range(timing.rounds)):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            seconds[name].append(elapsed(calls[name], device, timing.clock))
    return {name: Latency(tuple(values)) for name, values in seconds.items()}


def random_ids(model: DiffusionLM, batch: int, length: int) -> torch.Tensor:
    """Seeded ids (B, T) on the model's device, none of them the mask token."""
    adapter = Adapter(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(adapter.vocabulary - 1, (batch, length), generator=generator)  # (B, T)
    return (ids + (ids >= adapter.mask_id)).to(compute_device(model))


@torch.inference_mode()
def measure_latency(
    models: dict[str, DiffusionLM], length: int, batch: int = 1, timing: Timing = DEFAULT
) -> dict[str, Latency]:
    """Time `model(ids)` (logits of all positions) of several models in turns, on the same random ids (B, T).

    Args:
        models: name -> model; all on one device, with one vocabulary.
    Returns:
        name -> `Latency`.
    """
    ids = random_ids(next(iter(models.values())), batch, length)  # (B, T)
    return interleaved({name: partial(model, ids) for name, model in models.items()}, ids.device, timing)


def speedup(dense: Latency, pruned: Latency) -> dict[str, float]:
    """Median over rounds of dense / pruned time, with its quartiles."""
    return quartiles(dense.tensor() / pruned.tensor())


def ideal_share(speed: dict[str, float], macs: tuple[int, int]) -> dict[str, float] | None:
    """Share of the ideal saving that is reached: (1 - 1 / speed-up) / (share of MACs removed).

    Args:
        speed: a speed-up with its quartiles, as `speedup` returns.
        macs: of the dense and the pruned model for the same work, including attention and LM head.
    Returns:
        The share at the median and at both quartiles; None where no MACs are removed.
    """
    removed = 1 - macs[1] / macs[0]
    return {name: (1 - 1 / value) / removed for name, value in speed.items()} if removed > 0 else None
