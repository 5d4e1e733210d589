"""Forward latency of several models, measured interleaved in one run so that drift hits all of them alike."""

import time
from dataclasses import dataclass
from typing import Callable

import torch

from structprune.models.adapter import Adapter
from structprune.models.modeling_structprune import DiffusionLM


@dataclass(frozen=True)
class Latency:
    """Seconds per forward pass of one model, one entry per round.

    Attributes:
        seconds: in the order measured; entry i of two models of one run belong to the same round.
    """

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return 1e3 * torch.tensor(self.seconds, dtype=torch.float64).median().item()

    def quantile_ms(self, share: float) -> float:
        return 1e3 * torch.tensor(self.seconds, dtype=torch.float64).quantile(share).item()


@torch.inference_mode()
def measure_latency(
    models: dict[str, DiffusionLM],
    length: int,
    batch: int = 1,
    rounds: int = 20,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time `model(ids)` (logits of all positions) of every model in turn, `rounds` times.

    Args:
        models: name -> model; all on one device, with one vocabulary.
        length: tokens per sequence T. batch: sequences per pass.
        warmup: untimed passes per model.
        clock: seconds; for tests.
    Returns:
        name -> `Latency`.
    """
    first = next(iter(models.values()))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(Adapter(first).vocabulary, (batch, length), generator=generator).to(first.device)  # (B, T)
    wait = torch.cuda.synchronize if first.device.type == "cuda" else (lambda: None)
    for model in models.values():
        for _ in range(warmup):
            model(ids)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            wait()
            start = clock()
            model(ids)
            wait()
            seconds[name].append(clock() - start)
    return {name: Latency(tuple(values)) for name, values in seconds.items()}


def speedup(dense: Latency, pruned: Latency) -> dict[str, float]:
    """Median over rounds of dense / pruned time, with its quartiles."""
    before, after = (torch.tensor(side.seconds, dtype=torch.float64) for side in (dense, pruned))  # (n,)
    ratios = before / after  # (n,)
    low, middle, high = (ratios.quantile(share).item() for share in (0.25, 0.5, 0.75))
    return {"median": middle, "p25": low, "p75": high}
