"""The cost that measuring sinks adds to a calibration forward pass, in one run.

    python -m scripts.bench.bench_sinks [--length 1024] [--width 512] [--blocks 4] [--rounds 15] [--device cuda]
        [--out FILE]

Three forward passes of a random LLaDA take turns: the plain pass, the pass with the mass that sink weights need
(`MassMeter`), and the pass with everything that `structprune sinks` measures: mass and sinks of every head (`HeadMeter`
and `Recorder`). The ratio is the median over rounds. Writes the figures as JSON with a description of the machine.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.table import Table

from scripts.tools.script_line import OneLineParser, check_counts, one_line, result_file, show_result, write_result
from structprune.bench.latency import Timing, interleaved, speedup
from structprune.bench.machine import describe_machine
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.models.configuration_structprune import StructpruneLLaDAConfig
from structprune.models.modeling_structprune import StructpruneLLaDA
from structprune.models.placement import pick_device
from structprune.sinks.trajectory import Recorder
from structprune.statistics.capture import HeadMeter, MassMeter

OUT = Path(__file__).parents[1] / "results" / "sinks_cost.json"
TARGET = 1.3  # measuring may cost at most this times the plain pass


def make_runs(options: argparse.Namespace) -> dict:
    """The three forward passes, by name."""
    sizes = {"d_model": options.width, "n_heads": options.width // 64, "mlp_hidden_size": 3 * options.width}
    config = StructpruneLLaDAConfig(**sizes, n_layers=options.blocks, vocab_size=512, mask_token_id=511)
    torch.manual_seed(0)
    model = StructpruneLLaDA(config).to(options.device).eval()
    cores = [view.core for view in Adapter(model).blocks]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (1, options.length), generator=generator).to(options.device)  # (1, T)

    def with_mass():
        with MassMeter().on(cores) as meter:
            model.encode(ids)
            meter.take()

    def with_heads():
        with HeadMeter().on(cores) as meter:
            model.encode(ids)
            Recorder(1, causal=False).add([0], [0], ids, meter.take())

    return {"plain": lambda: model.encode(ids), "mass": with_mass, "heads": with_heads}


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict:
    """Medians in milliseconds, and the ratio to the plain pass with its quartiles."""
    times = interleaved(make_runs(options), options.device, Timing(options.rounds, warmup=1))
    return {
        "median_ms": {name: latency.median_ms for name, latency in times.items()},
        "ratio": {name: speedup(times[name], times["plain"]) for name in ("mass", "heads")},
        "target": TARGET,
    }


def result_table(result: dict, options: argparse.Namespace) -> Table:
    table = Table(title=f"cost of measuring sinks: T = {options.length}, width {options.width}, {options.device}")
    for name in ("forward pass", "ms", "ratio (quartiles)"):
        table.add_column(name, justify="left" if name == "forward pass" else "right")
    titles = {"plain": "plain", "mass": "with the mass for sink weights", "heads": "with all that `sinks` measures"}
    for name, title in titles.items():
        ratio = result["ratio"].get(name)
        quartiles = f"{ratio['median']:.2f}x ({ratio['p25']:.2f} to {ratio['p75']:.2f})" if ratio else ""
        table.add_row(title, f"{result['median_ms'][name]:.1f}", quartiles)
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--length", type=int, default=1024, help="positions T (default %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="features, a multiple of 64 (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each (default %(default)s)")
    parser.add_device("cpu")
    parser.add_argument("--threads", type=int, help="torch's threads on CPU (default: its own choice)")
    parser.add_argument("--out", type=result_file, default=OUT, help="default %(default)s")
    options = parser.parse_args(arguments)
    check_counts(options, ("length", "width", "blocks", "rounds", "threads"))
    if options.width % 64:
        raise UserError(f"--width = {options.width} is not a multiple of 64, the head dim")
    options.device = pick_device(options.device)
    return options


def run(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("length", "width", "blocks", "rounds")}
    settings |= {"threads": torch.get_num_threads(), "device": str(options.device), "batch": 1, "dtype": "float32"}
    result = {"machine": describe_machine(), "settings": settings} | measure(options)
    write_result(options.out, result)
    show_result(result_table(result, options), out=options.out, width=100)


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_sinks", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
