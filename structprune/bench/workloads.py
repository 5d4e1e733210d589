"""What is timed: forward passes and whole generations of several models, the first of which the others are held to."""

from typing import Callable, Iterable

import torch

from structprune.bench.latency import Latency, ideal_share, interleaved, measure_latency, random_ids, speedup
from structprune.bench.macs import counted_macs
from structprune.bench.peak import peak_above
from structprune.generation.generate import generate
from structprune.generation.samplers import Generation
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device

Models = dict[str, DiffusionLM]
Track = Callable[[Iterable], Iterable]


def rows_of(found: dict[str, Latency], macs: dict[str, int], tokens: int) -> dict[str, dict]:
    """Name -> figures of one workload as plain data, each model beside the first.

    Args:
        macs: of the workload, by name.
        tokens: that it processes or generates.
    """
    first, rows = next(iter(found)), {}
    for name, latency in found.items():
        row = {"model": name, "ms": latency.quartiles_ms(), "tokens_per_second": 1e3 * tokens / latency.median_ms}
        row |= {"macs": macs[name], "macs_removed": 1 - macs[name] / macs[first]}
        if name != first:
            speed = speedup(found[first], latency)
            row |= {"speedup": speed, "ideal_share": ideal_share(speed, (macs[first], macs[name]))}
        rows[name] = row
    return rows


@torch.inference_mode()
def forward_rows(models: Models, batch: int, length: int, rounds: int, warmup: int, track: Track) -> list[dict]:
    """Latency, MACs and peak memory of `model(ids)`, logits at all (B, T) positions."""
    ids = random_ids(next(iter(models.values())), batch, length)  # (B, T)
    macs = {}
    for name, model in models.items():
        with counted_macs(model) as count:
            model(ids)
        macs[name] = count.total
    found = measure_latency(models, length, batch, rounds, warmup, track=track)
    peaks = {name: peak_above(lambda model=model: model(ids), ids.device) for name, model in models.items()}
    rows = rows_of(found, macs, batch * length)
    return [{"batch": batch, "length": length, **row, "peak_above_weights": peaks[name]} for name, row in rows.items()]


def generation_rows(
    models: Models,
    batch: int,
    length: int,
    settings: Generation,
    cache: str,
    rounds: int,
    warmup: int,
    full: dict[str, torch.Tensor],
    track: Track,
) -> list[dict]:
    """Tokens per second, MACs and peak memory of whole generations, and their agreement with full recomputation.

    Args:
        length: of prompt and generated tokens together.
        warmup: untimed generations of each model before, beyond the one that is counted, which nothing compiles.
        full: name -> tokens (B, P + G) of full recomputation at this size; what is missing is made and added.
    """
    first = next(iter(models.values()))
    prompts, device = random_ids(first, batch, length - settings.gen_length), compute_device(first)  # (B, P)
    calls, macs, agreement = {}, {}, {}
    for name, model in models.items():
        calls[name] = lambda model=model: generate(model, prompts, settings, batch=batch, cache=cache)
        with counted_macs(model) as count:
            made = calls[name]()  # (B, P + G)
        macs[name] = count.total
        if cache == "none":
            full[name] = made
            continue
        if name not in full:
            full[name] = generate(model, prompts, settings, batch=batch)
        agreement[name] = (made == full[name])[:, -settings.gen_length :].double().mean().item()
    found = interleaved(calls, device, rounds, warmup, track=track)
    peaks = {name: peak_above(call, device) for name, call in calls.items()}
    rows = rows_of(found, macs, batch * settings.gen_length)
    same = {"batch": batch, "length": length, "cache": cache}
    return [
        {**same, **row, "agreement": agreement.get(name), "peak_above_weights": peaks[name]}
        for name, row in rows.items()
    ]
