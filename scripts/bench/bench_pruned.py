"""A LLaDA with random weights, pruned and benchmarked in one run: pruning time, and share of the ideal saving reached.

    python -m scripts.bench.bench_pruned [--ratios 0.3,0.5] [--length 512] [--out scripts/results/bench_cpu.json]

Speed and memory depend only on shapes; the model's output has no meaning. Each ratio is a whole structured run on
random ids (scores, plan, refit, check), with the share of time spent in forward passes. Then everything that
`structprune bench` measures; its plots are written beside the figures.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from scripts.bench.forward_clock import ForwardClock
from scripts.tools.random_checkpoint import LLaDAShape, llada_values, write_random
from scripts.tools.script_line import (
    OneLineParser,
    is_quick,
    one_line,
    parse_numbers,
    result_file,
    show_result,
    write_result,
)
from structprune.bench.settings import BenchSettings
from structprune.calibration.batches import Calibration
from structprune.calibration.noise import level_times, noise_windows
from structprune.cli.console import progress_bars
from structprune.config import Config, ModelSettings
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device, synchronise
from structprune.report.bench_tables import bench_tables
from structprune.runs.bench import BenchOutput, bench, check_checkpoints
from structprune.runs.pruned import Pruned
from structprune.runs.pruner import Pruner

OUT = Path(__file__).parents[1] / "results" / "bench_cpu.json"
STEPS = 50  # of the forward process; calibration uses `levels` of them
SIZES = {"width": 1024, "heads": 8, "blocks": 6, "channels": 3072, "vocabulary": 8192, "length": 512}
VOLUME = {"windows": 24, "held_out": 4, "window": 128, "levels": 5}
PACE = {"gen_length": 128, "steps": 16, "block_length": 32, "rounds": 15, "generation_rounds": 5}
QUICK = {
    "width": 64, "heads": 4, "blocks": 2, "channels": 128, "vocabulary": 256, "length": 32, "windows": 3, "held_out": 2,
    "window": 16, "levels": 2, "gen_length": 8, "steps": 4, "block_length": 4, "rounds": 2, "generation_rounds": 1,
}  # fmt: skip


def random_calibration(model: DiffusionLM, options: argparse.Namespace) -> Calibration:
    """Random ids under the family's noise: `windows` to fit on, and held-out ones."""
    adapter, generator = Adapter(model), torch.Generator().manual_seed(0)
    count = options.windows + options.held_out
    ids = torch.randint(adapter.mask_id, (count, options.window), generator=generator)  # (N, T)
    times = level_times(STEPS, STEPS // options.levels)  # (S,)
    schedule, edges = adapter.family.schedule, model.edges_visible
    noisy, probability = noise_windows(ids, adapter.mask_id, schedule, generator, times, edges)  # (N, S, T), (N, S)
    return Calibration(ids, noisy, probability, {}, options.held_out)


def run_config(options: argparse.Namespace, ratio: float) -> Config:
    """The default recipe at the volume of the options. The split is set, because random weights cannot measure it."""
    return Config.load(
        overrides={
            "calibration.windows": options.windows,
            "calibration.held_out": options.held_out,
            "calibration.length": options.window,
            "calibration.interval": STEPS // options.levels,
            "structured.ratio": ratio,
            "structured.split": options.split,
        }
    )


def prune_once(dense: Path, out: Path, ratio: float, options: argparse.Namespace, track) -> dict:
    """A whole structured run, saved; returns its time, and the share of forward passes."""
    device = pick_device(options.device)
    model = load_model(dense, options.dtype, device)
    calibration = random_calibration(model, options)
    clock, start = ForwardClock(device), time.perf_counter()
    with clock.running():
        pruned = Pruner(model, run_config(options, ratio), calibration, track).prune()
    synchronise(device)
    seconds = time.perf_counter() - start
    pruned.save(out)
    return run_figures(pruned, ratio, seconds, clock)


def run_figures(pruned: Pruned, ratio: float, seconds: float, clock: ForwardClock) -> dict:
    """Time and memory of a structured run, and the share of forward passes."""
    report = pruned.report
    return {
        "asked": ratio,
        "ratio": report["ratio"],
        "seconds": seconds,
        "phases": report["seconds"],
        "forward_seconds": clock.seconds,
        "forward_share": clock.seconds / seconds,
        "peak_memory_bytes": report["peak_memory_bytes"],
        "kept": report["held_out_nelbo"]["kept"],
    }


def measure(options: argparse.Namespace, folder: Path, out: Path | None) -> dict:
    """Checkpoint, pruning runs and benchmark; plots go beside `out`."""
    shape = {name: getattr(options, name) for name in SIZES}
    values = llada_values(LLaDAShape(*shape.values()), options.dtype or "float32")
    settings = BenchSettings(
        batches=(options.batch,),
        lengths=(options.length,),
        gen_length=options.gen_length,
        steps=options.steps,
        block_length=options.block_length,
        caches=("all",),
        compiled=options.compile,
        rounds=options.rounds,
        generation_rounds=options.generation_rounds,
    )
    dense = write_random(folder / "dense", values)
    place = ModelSettings(device=options.device, dtype=options.dtype)
    check_checkpoints([str(dense)], settings, place)  # before minutes of pruning
    with progress_bars() as track:
        runs = [prune_once(dense, folder / f"pruned-{ratio}", ratio, options, track) for ratio in options.ratios]
        checkpoints = [str(dense), *(str(folder / f"pruned-{ratio}") for ratio in options.ratios)]
        benchmark = bench(checkpoints, settings, BenchOutput(folder / "bench", plots=out is not None), place, track)
    volume = {name: getattr(options, name) for name in (*VOLUME, "split")}
    result = benchmark.result | {"weights": "random", "shape": shape, "calibration": volume, "pruning": runs}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in (path for path in benchmark.paths if path.suffix == ".png"):
            shutil.move(path, out.with_name(f"{out.stem}_{path.name}"))
        write_result(out, result)
    return result


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_counts(SIZES | VOLUME | PACE | {"batch": 1})
    parser.add_argument("--ratios", default="0.3,0.5", help="ratios to prune at (default %(default)s)")
    parser.add_argument("--split", default="by-cost", help="structured.split (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_device()
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default float32)")
    parser.add_quick()
    parser.add_argument("--out", type=result_file, help=f"default {OUT}")
    if is_quick(arguments):
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    options.ratios = parse_numbers("--ratios", options.ratios, float)
    if not 1 <= options.levels <= STEPS:
        raise UserError(f"--levels {options.levels}: give 1 to {STEPS}")
    if options.heads < 1 or options.width % (2 * options.heads):
        raise UserError(f"--width {options.width}: each of {options.heads} heads needs an even share")
    options.out = options.out or (None if options.quick else OUT)
    return options


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="bench-pruned-") as folder:
        result = measure(options, Path(folder), options.out)
    lines = [
        f"pruning at {row['asked']}: {row['seconds']:.1f} s, {100 * row['forward_share']:.0f} % of it in forward passes"
        for row in result["pruning"]
    ]
    show_result(*bench_tables(result), *lines, out=options.out)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_pruned", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
