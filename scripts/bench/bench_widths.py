"""What MLP widths that are no multiples of 128 cost on this device.

    python -m scripts.bench.bench_widths [--hidden 1024] [--centres 1024,1536,2048] [--tokens 512] [--device cuda]

Times a gated MLP (the three products, as in a block) at widths between two multiples of 128, in turns. A width's cost
is its time over the time that its number of channels would take, on the line between the two multiples. Widths come in
alignments: the largest power of two up to 128 that divides them. Checks `structured.round_to` against it: the smallest
alignment of which every coarser one costs at most 3%.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from scripts.tools.script_line import OneLineParser, is_quick, one_line, result_file, write_result
from structprune.bench.latency import Latency, Timing, interleaved
from structprune.bench.machine import describe_machine
from structprune.cli.console import progress_bars
from structprune.errors import UserError
from structprune.models.loading import as_dtype
from structprune.models.placement import pick_device
from structprune.structured.sizes import ROUNDINGS

OUT = Path(__file__).parents[1] / "results" / "widths.json"
STEP = 128
OFFSETS = (1, 4, 8, 24, 16, 48, 32, 96, 64)  # past a multiple of 128; two of each alignment from 8 to 32
FREE = 0.03  # a cost that is none
QUICK = {"hidden": 32, "centres": "128", "tokens": 4, "rounds": 3}


def alignment(width: int) -> int:
    """The largest power of two up to 128 that divides a width."""
    return min(STEP, width & -width)


def cost(found: dict[int, Latency], low: int, width: int) -> dict[str, float]:
    """Median and quartiles over rounds of a width's time over that on the line from `low` to `low` + 128, less 1."""
    start, end, own = (torch.tensor(found[each].seconds, dtype=torch.float64) for each in (low, low + STEP, width))
    line = start + (end - start) * (width - low) / STEP  # (n,)
    p25, middle, p75 = (own / line - 1).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": middle, "p25": p25, "p75": p75}


def mlp_call(width: int, options: argparse.Namespace):
    """One gated MLP of a width on fixed inputs, `tokens` x `hidden`."""
    device, dtype = pick_device(options.device), as_dtype(options.dtype)
    shapes = ((options.tokens, options.hidden), *2 * [(width, options.hidden)], (options.hidden, width))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) * shape[1] ** -0.5 for shape in shapes]
    x, gate, up, down = (each.to(device, dtype) for each in drawn)  # (N, C), 2 x (M, C), (C, M)
    return lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@torch.inference_mode()
def width_rows(low: int, options: argparse.Namespace, track) -> list[dict]:
    """A row for every width between `low` and `low` + 128."""
    widths = [low, low + STEP, *(low + offset for offset in OFFSETS)]
    calls = {width: mlp_call(width, options) for width in widths}
    found = interleaved(calls, pick_device(options.device), Timing(options.rounds, 2, track))
    return [
        {
            "width": width,
            "alignment": alignment(width),
            "ms": found[width].quartiles_ms(),
            "cost": cost(found, low, width),
        }
        for width in sorted(widths)
    ]


def summarise(rows: list[dict]) -> tuple[dict[int, float], int]:
    """Median cost of every alignment, and the smallest of which it and all coarser ones are free."""
    kinds = sorted({row["alignment"] for row in rows}, reverse=True)
    costs = {kind: median(row["cost"]["median"] for row in rows if row["alignment"] == kind) for kind in kinds}
    free = STEP
    for kind, value in costs.items():
        if value > FREE:
            break
        free = kind
    return costs, free


def result_table(rows: list[dict], costs: dict[int, float], free: int) -> Table:
    table = Table(title="a gated MLP at widths that are no multiples of 128")
    for name in ("alignment", "widths", "cost, median", "lowest", "highest"):
        table.add_column(name, justify="right")
    for kind, value in costs.items():
        found = [row["cost"]["median"] for row in rows if row["alignment"] == kind]
        cells = (f"{100 * each:+.1f} %" for each in (value, min(found), max(found)))
        table.add_row(str(kind), str(len(found)), *cells)
    table.caption = (
        f"cost: time over that of as many channels between two multiples of 128; multiples of {free} cost at most"
        f" {100 * FREE:.0f} %; structured.round_to = auto takes {ROUNDINGS[0]} where the MLP is wide enough"
    )
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--centres", default="1024,1536,2048", help="multiples of 128 (default %(default)s)")
    for name, value in {"hidden": 1024, "tokens": 512, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--device", help="cpu or cuda[:N] (default: cuda where there is one)")
    parser.add_argument("--dtype", help="default float32 on CPU, bfloat16 on CUDA")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes by default; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=result_file, help=f"default {OUT}")
    if is_quick(arguments):
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    try:
        options.centres = [int(part) for part in options.centres.split(",")]
    except ValueError as error:
        raise UserError(f"--centres '{options.centres}' is no list of numbers: write them as in 1024,2048") from error
    for low in options.centres:
        if low < STEP or low % STEP:
            raise UserError(f"--centres {low} is no multiple of {STEP}: give such as 1024")
    for name in ("hidden", "tokens", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: give at least 1")
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
    console = Console()
    console.print(result_table(rows, costs, free))
    if options.out:
        kept = ("hidden", "centres", "tokens", "rounds", "dtype")
        settings = {name: getattr(options, name) for name in kept} | {"device": str(pick_device(options.device))}
        result = {"machine": describe_machine(), "settings": settings, "rows": rows}
        result |= {"costs": {str(kind): value for kind, value in costs.items()}, "free": free}
        write_result(options.out, result)
        console.print(f"Wrote {options.out}", soft_wrap=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_widths", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
