"""The cost of MLP widths that are not multiples of 128 on this device.

    python -m scripts.bench.bench_widths [--hidden 1024] [--centres 1024,1536,2048] [--tokens 512] [--device cuda]

Times a gated MLP (its three products, as in a block) at widths between two multiples of 128, in turns. The cost of a
width is its time relative to the line between the two multiples, at the same number of channels. The alignment of a
width is the largest power of two up to 128 that divides it. Compares `structured.round_to` with the smallest alignment
such that it and all larger ones cost at most 3%.
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from scripts.tools.script_line import (
    OneLineParser,
    check_counts,
    is_quick,
    one_line,
    parse_numbers,
    result_file,
    show_result,
    write_result,
)
from structprune.bench.latency import Latency, Timing, interleaved, quartiles
from structprune.bench.machine import describe_machine
from structprune.cli.console import progress_bars
from structprune.errors import UserError
from structprune.models.loading import as_dtype
from structprune.models.placement import pick_device
from structprune.structured.sizes import ROUNDINGS

OUT = Path(__file__).parents[1] / "results" / "widths.json"
STEP = 128
OFFSETS = (1, 4, 8, 24, 16, 48, 32, 96, 64)  # above a multiple of 128; two for each alignment from 8 to 32
FREE = 0.03  # a cost up to this counts as none
QUICK = {"hidden": 32, "centres": "128", "tokens": 4, "rounds": 3}


def alignment(width: int) -> int:
    """The largest power of two up to 128 that divides a width."""
    return min(STEP, width & -width)


def cost(latencies: dict[str, Latency], low: int, width: int) -> dict[str, float]:
    """Time of a width relative to the line from `low` to `low` + 128, less 1: median and quartiles over rounds."""
    start, end, own = (latencies[str(each)].tensor() for each in (low, low + STEP, width))  # 3 x (n,)
    line = start + (end - start) * (width - low) / STEP  # (n,)
    return quartiles(own / line - 1)


def mlp_call(width: int, options: argparse.Namespace):
    """A gated MLP of this width on fixed inputs, `tokens` x `hidden`."""
    device, dtype = pick_device(options.device), as_dtype(options.dtype)
    shapes = ((options.tokens, options.hidden), *2 * [(width, options.hidden)], (options.hidden, width))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) * shape[1] ** -0.5 for shape in shapes]
    x, gate, up, down = (each.to(device, dtype) for each in tensors)  # (N, C), 2 x (M, C), (C, M)
    return lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@torch.inference_mode()
def width_rows(low: int, options: argparse.Namespace, track) -> list[dict]:
    """A row for every width between `low` and `low` + 128."""
    widths = [low, low + STEP, *(low + offset for offset in OFFSETS)]
    calls = {str(width): mlp_call(width, options) for width in widths}
    latencies = interleaved(calls, pick_device(options.device), Timing(options.rounds, 2, track))
    return [
        {
            "width": width,
            "alignment": alignment(width),
            "ms": latencies[str(width)].quartiles_ms(),
            "cost": cost(latencies, low, width),
        }
        for width in sorted(widths)
    ]


def summarise(rows: list[dict]) -> tuple[dict[int, float], int]:
    """Median cost of every alignment, and the smallest one such that it and all larger ones are free."""
    kinds = sorted({row["alignment"] for row in rows}, reverse=True)
    costs = {kind: median(row["cost"]["median"] for row in rows if row["alignment"] == kind) for kind in kinds}
    free = STEP
    for kind, value in costs.items():
        if value > FREE:
            break
        free = kind
    return costs, free


def result_table(rows: list[dict], costs: dict[int, float], free: int) -> Table:
    table = Table(title="a gated MLP at widths that are not multiples of 128")
    for name in ("alignment", "widths", "cost, median", "lowest", "highest"):
        table.add_column(name, justify="right")
    for kind, value in costs.items():
        values = [row["cost"]["median"] for row in rows if row["alignment"] == kind]
        cells = (f"{100 * each:+.1f} %" for each in (value, min(values), max(values)))
        table.add_row(str(kind), str(len(values)), *cells)
    table.caption = (
        f"cost: time relative to the line between two multiples of 128; multiples of {free} cost at most"
        f" {100 * FREE:.0f} %; structured.round_to = auto uses {ROUNDINGS[0]} if the MLP is wide enough"
    )
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--centres", default="1024,1536,2048", help="multiples of 128 (default %(default)s)")
    parser.add_counts({"hidden": 1024, "tokens": 512, "rounds": 15})
    parser.add_device()
    parser.add_argument("--dtype", help="default float32 on CPU, bfloat16 on CUDA")
    parser.add_quick()
    parser.add_argument("--out", type=result_file, help=f"default {OUT}")
    if is_quick(arguments):
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    options.centres = parse_numbers("--centres", options.centres)
    for low in options.centres:
        if low < STEP or low % STEP:
            raise UserError(f"--centres {low} is not a multiple of {STEP}: give a number such as 1024")
    check_counts(options, ("hidden", "tokens", "rounds"))
    options.dtype = options.dtype or ("bfloat16" if pick_device(options.device).type == "cuda" else "float32")
    as_dtype(options.dtype)
    options.out = options.out or (None if options.quick else OUT)
    return options


def run(options: argparse.Namespace) -> int:
    rows = []
    with progress_bars() as track:
        for low in options.centres:
            rows += width_rows(low, options, lambda items, low=low: track(items, f"widths from {low}"))
    costs, free = summarise(rows)
    if options.out:
        names = ("hidden", "centres", "tokens", "rounds", "dtype")
        settings = {name: getattr(options, name) for name in names} | {"device": str(pick_device(options.device))}
        result: dict[str, Any] = {"machine": describe_machine(), "settings": settings, "rows": rows}
        result |= {"costs": {str(kind): value for kind, value in costs.items()}, "free": free}
        write_result(options.out, result)
    show_result(result_table(rows, costs, free), out=options.out)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_widths", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
