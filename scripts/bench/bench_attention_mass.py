"""Tiled attention mass against the naive full matrix: peak memory above the inputs, and time, in one run.

    python -m scripts.bench.bench_attention_mass [--lengths 256,512,1024,2048,4096] [--device cuda] [--out FILE]

Peak memory is measured in a fresh process per case; times alternate between the two, and the ratio is the median over
rounds. The last column is what the mass adds to the forward pass of one LLaDA block of the same width. Writes the
figures as JSON with a description of the machine.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from scripts.tools.script_line import OneLineParser, one_line, result_file, write_result
from structprune.bench.latency import Timing, interleaved, speedup
from structprune.bench.machine import describe_machine
from structprune.bench.peak import peak_above
from structprune.cli.console import progress_bars
from structprune.errors import UserError
from structprune.models.configuration_structprune import StructpruneLLaDAConfig
from structprune.models.modeling_structprune import StructpruneLLaDA
from structprune.models.placement import pick_device
from structprune.statistics.capture import MassMeter
from structprune.statistics.sinks import attention_mass

OUT = Path(__file__).parents[1] / "results" / "attention_mass.json"
LENGTHS = (256, 512, 1024, 2048, 4096)
WARMUP = 64  # positions of the untimed pass that loads libraries and starts threads


def naive_mass(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The whole (H, T, T) attention of each sequence in fp32, then summed: two (B, H, T, D) -> (B, T)."""
    rows = []
    for q, k in zip(query.float() / math.sqrt(query.shape[-1]), key.float()):  # (H, T, D)
        rows.append(torch.softmax(q @ k.transpose(1, 2), dim=-1).sum(dim=(0, 1)))  # (H, T, T) -> (T,)
    return torch.stack(rows)


METHODS = {"naive": naive_mass, "tiled": attention_mass}


def make_inputs(length: int, heads: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeded queries and keys, (1, H, T, D), laid out as a model's are."""
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(1, length, heads, size, generator=generator) for _ in range(2))  # (1, T, H, D)
    query, key = (x.transpose(1, 2).to(device) for x in pair)
    return 2 * query, key  # scaled so that attention is far from uniform


def run_case(method: str, length: int, options: argparse.Namespace) -> int | None:
    """Bytes that one method needs at its peak beyond its inputs, in this process; None where that cannot be known."""
    query, key = make_inputs(length, options.heads, options.size, options.device)  # (1, H, T, D)
    METHODS[method](query[:, :, :WARMUP], key[:, :, :WARMUP])
    return peak_above(lambda: METHODS[method](query, key), options.device)


def memory_case(method: str, length: int, options: argparse.Namespace) -> int | None:
    """`run_case` of one method in a fresh process."""
    case = ["--case", method, "--lengths", str(length), "--heads", str(options.heads)]
    command = [sys.executable, "-m", "scripts.bench.bench_attention_mass", *case]
    command += ["--size", str(options.size), "--device", str(options.device), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=OUT.parents[2])
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the {method} case failed at T = {length} ({last}): leave it out of --lengths")
    return json.loads(done.stdout)


def block_runs(length: int, options: argparse.Namespace) -> dict:
    """One LLaDA block's forward pass, alone and with the mass of its attention taken."""
    width = options.heads * options.size
    sizes = {"d_model": width, "n_heads": options.heads, "n_layers": 1, "mlp_hidden_size": 3 * width}
    config = StructpruneLLaDAConfig(**sizes, vocab_size=8, mask_token_id=7)
    model = StructpruneLLaDA(config).to(options.device).eval()
    block, rotary = model.blocks[0], model.rotary(length, options.device)
    hidden = torch.randn(1, length, width, device=options.device)  # (1, T, C)

    def with_mass():
        with MassMeter().on([block.part("core")]) as meter:
            block(hidden, rotary)
            meter.take()

    return {"block": lambda: block(hidden, rotary), "block with mass": with_mass}


@torch.inference_mode()
def measure(length: int, options: argparse.Namespace) -> dict:
    """All figures at one length."""
    peaks = {method: memory_case(method, length, options) for method in METHODS}
    query, key = make_inputs(length, options.heads, options.size, options.device)  # (1, H, T, D)
    naive, tiled = (run(query, key) for run in METHODS.values())  # (1, T)
    runs = {name: lambda run=run: run(query, key) for name, run in METHODS.items()}
    times = interleaved(runs | block_runs(length, options), options.device, Timing(options.rounds, warmup=1))
    return {
        "length": length,
        "peak_bytes": peaks,
        "memory_ratio": None if None in peaks.values() else peaks["naive"] / max(1, peaks["tiled"]),
        "median_ms": {name: latency.median_ms for name, latency in times.items()},
        "time_ratio": speedup(times["naive"], times["tiled"]),
        "forward_ratio": speedup(times["block with mass"], times["block"]),
        "max_relative_difference": ((tiled - naive).abs() / naive).max().item(),
    }


def result_table(rows: list[dict], options: argparse.Namespace) -> Table:
    table = Table(title=f"attention mass, {options.heads} heads of {options.size}, {options.device}")
    names = ("T", "naive MB", "tiled MB", "less memory", "naive ms", "tiled ms", "faster (quartiles)", "difference")
    for name in (*names, "added to a block"):
        table.add_column(name, justify="right")
    for row in rows:
        peak, median, ratio = row["peak_bytes"], row["median_ms"], row["time_ratio"]
        table.add_row(
            f"{row['length']:,}",
            *("?" if peak[method] is None else f"{peak[method] / 1e6:,.1f}" for method in METHODS),
            "?" if row["memory_ratio"] is None else f"{row['memory_ratio']:.1f} x",
            *(f"{median[method]:,.1f}" for method in METHODS),
            f"{ratio['median']:.2f} x ({ratio['p25']:.2f} to {ratio['p75']:.2f})",
            f"{row['max_relative_difference']:.0e}",
            f"{row['forward_ratio']['median'] - 1:+.0%}",
        )
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Checked options; `lengths` as integers, `device` as a torch device."""
    parser = OneLineParser(__doc__)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="positions T (default %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query and key heads H (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="head dim D, even (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed passes of each (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N] (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch on CPU (default: its own choice)")
    parser.add_argument("--out", type=result_file, default=OUT, help="default %(default)s")
    parser.add_argument("--case", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    parts = options.lengths.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--lengths '{options.lengths}' is not a list of positive integers such as 256,1024")
    options.lengths = [int(part) for part in parts]
    for name in ("heads", "size", "rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} = {getattr(options, name)}: give at least 1")
    if options.size % 2:
        raise UserError(f"--size = {options.size}: rotary embeddings need an even head dim")
    options.device = pick_device(options.device)
    return options


def run(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.case:
        with torch.inference_mode():
            print(json.dumps(run_case(options.case, options.lengths[0], options)))
        return
    with progress_bars() as track:
        rows = [measure(length, options) for length in track(options.lengths, "attention mass")]
    settings = {"heads": options.heads, "head_dim": options.size, "batch": 1, "dtype": "float32"}
    settings |= {"rounds": options.rounds, "device": str(options.device)}
    write_result(options.out, {"machine": describe_machine(), "settings": settings, "rows": rows})
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(result_table(rows, options))
    console.print(f"Wrote {options.out}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_attention_mass", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
