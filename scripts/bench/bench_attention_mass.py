"""Tiled attention mass against the naive full matrix: peak memory above the inputs, and time, in one run.

    python -m scripts.bench.bench_attention_mass [--lengths 256,512,1024,2048,4096] [--device cuda] [--out FILE]

Peak memory is measured in a fresh process per case. The two are timed in turns, and the ratio is the median over
rounds. The last column is the time that the mass adds to the forward pass of one LLaDA block of the same width. Writes
the figures as JSON with a description of the machine.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from scripts.tools.script_line import (
    OneLineParser,
    check_counts,
    one_line,
    parse_numbers,
    result_file,
    run_json,
    show_result,
    write_result,
)
from structprune.bench.latency import Call, Timing, interleaved, speedup
from structprune.bench.machine import describe_machine
from structprune.bench.peak import peak_above
from structprune.cli.console import progress_bars
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.models.configuration_structprune import StructpruneLLaDAConfig
from structprune.models.modeling_structprune import DiffusionLM, StructpruneLLaDA
from structprune.models.placement import pick_device
from structprune.statistics.capture import MassMeter
from structprune.statistics.sinks import attention_mass

OUT = Path(__file__).parents[1] / "results" / "attention_mass.json"
LENGTHS = (256, 512, 1024, 2048, 4096)
WARMUP = 64  # positions of the unmeasured pass that loads libraries and starts threads


def naive_mass(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The full (H, T, T) attention of each sequence in fp32, summed over heads and queries: (B, H, T, D) -> (B, T)."""
    rows = []
    for q, k in zip(query.float() / math.sqrt(query.shape[-1]), key.float(), strict=True):  # (H, T, D)
        rows.append(torch.softmax(q @ k.transpose(1, 2), dim=-1).sum(dim=(0, 1)))  # (H, T, T) -> (T,)
    return torch.stack(rows)


METHODS = {"naive": naive_mass, "tiled": attention_mass}


def make_inputs(length: int, heads: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeded queries and keys (1, H, T, D) in the memory layout of a model."""
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(1, length, heads, size, generator=generator) for _ in range(2))  # (1, T, H, D)
    query, key = (x.transpose(1, 2).to(device) for x in pair)
    return 2 * query, key  # scaled so that attention is far from uniform


def run_case(method: str, length: int, options: argparse.Namespace) -> int | None:
    """Peak bytes of one method above its inputs, in this process; None where they cannot be measured."""
    query, key = make_inputs(length, options.heads, options.size, options.device)  # (1, H, T, D)
    METHODS[method](query[:, :, :WARMUP], key[:, :, :WARMUP])
    return peak_above(lambda: METHODS[method](query, key), options.device)


def memory_case(method: str, length: int, options: argparse.Namespace) -> Any:
    """`run_case` of one method in a fresh process."""
    case = ["--case", method, "--lengths", str(length), "--heads", str(options.heads)]
    command = [sys.executable, "-m", "scripts.bench.bench_attention_mass", *case]
    command += ["--size", str(options.size), "--device", str(options.device), "--threads", str(torch.get_num_threads())]
    failure = f"the {method} case failed at T = {length}"
    return run_json(command, failure, "leave it out of --lengths", cwd=OUT.parents[2])


def block_runs(length: int, options: argparse.Namespace) -> dict[str, Call]:
    """The forward pass of one LLaDA block, alone and with the mass of its attention."""
    width = options.heads * options.size
    sizes = {"d_model": width, "n_heads": options.heads, "n_layers": 1, "mlp_hidden_size": 3 * width}
    config = StructpruneLLaDAConfig(**sizes, vocab_size=8, mask_token_id=7)
    model = StructpruneLLaDA(config).to(options.device).eval()
    return block_calls(model, torch.randn(1, length, width, device=options.device))


def block_calls(model: DiffusionLM, hidden: torch.Tensor) -> dict[str, Call]:
    """The forward pass of a model's first block on (B, T, C), alone and with the mass of its attention."""
    view, context = Adapter(model).blocks[0], model.context(hidden.shape[:2], hidden.device)

    def with_mass() -> None:
        with MassMeter().on([view.core]) as meter:
            view.module(hidden, *context)
            meter.take()

    return {"block": lambda: view.module(hidden, *context), "block with mass": with_mass}


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
    parser.add_device("cpu")
    parser.add_argument("--threads", type=int, help="torch's threads on CPU (default: its own choice)")
    parser.add_argument("--out", type=result_file, default=OUT, help="default %(default)s")
    parser.add_argument("--case", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.lengths = parse_numbers("--lengths", options.lengths)
    if min(options.lengths) < 1:
        raise UserError(f"--lengths has {min(options.lengths)}: give positive numbers, such as 256,1024")
    check_counts(options, ("heads", "size", "rounds", "threads"))
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
    show_result(result_table(rows, options), out=options.out, width=160)


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_attention_mass", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
