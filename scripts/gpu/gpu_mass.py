"""The stage `mass` of gpu_report: time of attention mass in addition to attention, and to a forward pass."""

import argparse
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from scripts.bench.bench_attention_mass import block_calls
from scripts.gpu.flex_mass import attend_with_flex_mass
from scripts.gpu.gpu_common import shape_family, shape_values
from structprune.bench.latency import Call, Timing, interleaved, speedup
from structprune.bench.settings import Size
from structprune.models.adapter import Adapter
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device
from structprune.statistics.sinks import attention_mass

GOAL = 0.1  # at most this share of a forward pass


def one_block(values: dict, device: torch.device, dtype: torch.dtype) -> DiffusionLM:
    """A model with one block of a shape, random weights and a tiny vocabulary."""
    family = shape_family(values)
    sizes = {key: values[key] for key in (*family.width_keys.values(), family.keys["hidden"]) if key in values}
    sizes |= {family.keys["depth"]: 1, family.keys["vocabulary"]: 8, "vocab_size": 8, "mask_token_id": 7}
    torch.manual_seed(0)
    with device:
        model: Any = family.model_class(family.config_class(**sizes))
    return model.to(dtype).eval()


def mass(options: argparse.Namespace, track) -> dict:
    """At every batch size and length: attention, the mass, both at once by FlexAttention; a block's forward pass, alone
    and with the mass of its attention. A whole model is such blocks and the head, so the mass adds at most the share
    that it adds to a block. Needs no checkpoint.
    """
    device, values = pick_device(options.device), shape_values(options)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = one_block(values, device, dtype)
    config = model.config
    heads, kv_heads = (getattr(config, shape_family(values).width_keys[key]) for key in ("query_heads", "kv_heads"))
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": config.head_dim, "dtype": str(dtype)}
    sizes = [Size(batch, length) for batch in options.batches for length in options.lengths]
    with torch.no_grad():
        rows = [_row(model, shape, size, options.rounds) for size in track(sizes, "attention mass")]
    return {**shape, "wanted_on_top": GOAL, "rows": rows}


def _row(model: DiffusionLM, shape: dict, size: Size, rounds: int) -> dict:
    weight, batch, length = next(model.parameters()), size.batch, size.length
    generator = torch.Generator(weight.device).manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=weight.device, dtype=weight.dtype)

    query, key, value = (draw(batch, shape[name], length, shape["head_dim"]) for name in ("heads", *2 * ["kv_heads"]))
    grouped = shape["heads"] != shape["kv_heads"]  # (B, H, T, D), 2 x (B, K, T, D)
    mass_and_mixture = partial(attend_with_flex_mass, query, key, value)
    calls: dict[str, Call] = {
        "attention": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped),
        "tiled mass": lambda: attention_mass(query, key),
        "attention and mass, flex": mass_and_mixture,
    }
    calls |= block_calls(model, draw(batch, length, Adapter(model).hidden_size))
    gap = (mass_and_mixture()[1] - attention_mass(query, key)).abs().max().item()
    latencies = interleaved(calls, weight.device, Timing(rounds))
    ms = {name: latency.median_ms for name, latency in latencies.items()}
    flex = {"median": 1 + (ms["attention and mass, flex"] - ms["attention"]) / ms["block"]}
    ratios = {"tiled": speedup(latencies["block with mass"], latencies["block"]), "flex": flex}
    return {
        "batch": batch, "length": length, "median_ms": ms,
        "on_top_of_a_block": {way: {end: ratio - 1 for end, ratio in each.items()} for way, each in ratios.items()},
        "largest_difference": gap,
    }  # fmt: skip
