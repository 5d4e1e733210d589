"""The stage of gpu_report that measures attention mass: on top of attention, and on top of a forward pass."""

import argparse

import torch
import torch.nn.functional as F

from scripts.gpu.flex_mass import attend_with_flex_mass
from scripts.gpu.gpu_common import shape_family, shape_values
from structprune.bench.latency import Timing, interleaved, speedup
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device
from structprune.statistics.capture import MassMeter
from structprune.statistics.sinks import attention_mass

WANTED = 0.1  # of a forward pass


def one_block(values: dict, device: torch.device, dtype: torch.dtype) -> DiffusionLM:
    """A model of one block of a shape with random weights, and of hardly any vocabulary."""
    family = shape_family(values)
    sizes = {key: values[key] for key in (*family.width_keys.values(), family.keys["hidden"]) if key in values}
    sizes |= {family.keys["depth"]: 1, family.keys["vocabulary"]: 8, "vocab_size": 8, "mask_token_id": 7}
    torch.manual_seed(0)
    with device:
        return family.model_class(family.config_class(**sizes)).to(dtype).eval()


def mass(options: argparse.Namespace, track) -> dict:
    """At every batch and length: attention, the mass, both in one by FlexAttention; a block's forward pass, alone and
    with the mass of its attention. A whole model's pass is such blocks and the head, so that the mass adds at most what
    it adds to a block. Needs no checkpoint.
    """
    device, values = pick_device(options.device), shape_values(options)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = one_block(values, device, dtype)
    config = model.config
    heads, kv_heads = (getattr(config, shape_family(values).width_keys[key]) for key in ("query_heads", "kv_heads"))
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": config.head_dim, "dtype": str(dtype)}
    sizes = [(batch, length) for batch in options.batches for length in options.lengths]
    with torch.no_grad():
        rows = [_row(model, shape, *size, options.rounds) for size in track(sizes, "attention mass")]
    return {**shape, "wanted_on_top": WANTED, "rows": rows}


def _row(model: DiffusionLM, shape: dict, batch: int, length: int, rounds: int) -> dict:
    weight = next(model.parameters())
    generator = torch.Generator(weight.device).manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=weight.device, dtype=weight.dtype)

    query, key, value = (draw(batch, shape[name], length, shape["head_dim"]) for name in ("heads", *2 * ["kv_heads"]))
    grouped = shape["heads"] != shape["kv_heads"]  # (B, H, T, D), 2 x (B, K, T, D)
    calls = {
        "attention": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped),
        "tiled mass": lambda: attention_mass(query, key),
        "attention and mass, flex": lambda: attend_with_flex_mass(query, key, value),
    } | _block_calls(model, draw(batch, length, model.blocks[0].part("query").in_features))
    gap = (calls["attention and mass, flex"]()[1] - calls["tiled mass"]()).abs().max().item()
    found = interleaved(calls, weight.device, Timing(rounds))
    with_flex = {"median": 1 + (_ms(found, "attention and mass, flex") - _ms(found, "attention")) / _ms(found, "block")}
    added = {"tiled": speedup(found["block with mass"], found["block"]), "flex": with_flex}
    return {
        "batch": batch, "length": length, "median_ms": {name: _ms(found, name) for name in found},
        "on_top_of_a_block": {way: {end: ratio - 1 for end, ratio in each.items()} for way, each in added.items()},
        "largest_difference": gap,
    }  # fmt: skip


def _ms(found: dict, name: str) -> float:
    return found[name].median_ms


def _block_calls(model: DiffusionLM, hidden: torch.Tensor) -> dict:
    """A block's forward pass on (B, T, C), alone and with the mass of its attention taken."""
    block, rotary = model.blocks[0], model.rotary(hidden.shape[1], hidden.device)

    def with_mass() -> None:
        with MassMeter().on([block.part("core")]) as meter:
            block(hidden, rotary)
            meter.take()

    return {"block": lambda: block(hidden, rotary), "block with mass": with_mass}
