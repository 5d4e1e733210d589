"""A LLaDA with random weights, pruned and measured in one run: time of pruning, and share of the ideal saving reached.

    python -m scripts.bench.bench_pruned [--ratios 0.3,0.5] [--length 512] [--out scripts/results/bench_cpu.json]

Speed and memory depend on shapes alone; what the model would say means nothing. Each ratio is a whole structured run on
random ids (scores, plan, refit, check), with the share of it that is model forwards. What is measured then is
what `structprune bench` measures; the pictures are written beside the figures.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from scripts.bench.forward_clock import ForwardClock
from scripts.tools.random_checkpoint import llada_values, write_random
from scripts.tools.script_line import OneLineParser, is_quick, one_line, result_file, write_result
from structprune.bench.settings import BenchSettings
from structprune.calibration.batches import Calibration
from structprune.calibration.noise import noise_windows
from structprune.cli.console import progress_bars
from structprune.config import Config, ModelSettings
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device, synchronise
from structprune.report.bench_tables import bench_tables
from structprune.runs.bench import BenchOutput, bench, check_checkpoints
from structprune.runs.prune import Pruned, prune

OUT = Path(__file__).parents[1] / "results" / "bench_cpu.json"
STEPS = 50  # of the forward process; `levels` of them are calibrated on
SIZES = {"width": 1024, "heads": 8, "blocks": 6, "channels": 3072, "vocabulary": 8192, "length": 512}
VOLUME = {"windows": 24, "held-out": 4, "window": 128, "levels": 5}
PACE = {"gen-length": 128, "steps": 16, "block-length": 32, "rounds": 15, "generation-rounds": 5}
QUICK = {
    "width": 64, "heads": 4, "blocks": 2, "channels": 128, "vocabulary": 256, "length": 32, "windows": 3, "held_out": 2,
    "window": 16, "levels": 2, "gen_length": 8, "steps": 4, "block_length": 4, "rounds": 2, "generation_rounds": 1,
}  # fmt: skip


def random_calibration(model: DiffusionLM, options: argparse.Namespace) -> Calibration:
    """Random ids under the family's noise: `windows` to fit and the held-out ones."""
    adapter, generator = Adapter(model), torch.Generator().manual_seed(0)
    count = options.windows + options.held_out
    ids = torch.randint(adapter.mask_id, (count, options.window), generator=generator)  # (N, T)
    interval = STEPS // options.levels
    schedule = (adapter.mask_id, adapter.family.schedule, generator, STEPS, interval, model.edges_visible)
    noisy, probability = noise_windows(ids, *schedule)  # (N, S, T), (N, S)
    return Calibration(ids, noisy, probability, {}, options.held_out)


def run_config(options: argparse.Namespace, ratio: float) -> Config:
    """The default recipe on the volume asked for, but for the split: what to measure it by is only random here."""
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
    """A whole structured run, saved; what it took, and how much of that were forward passes."""
    device = pick_device(options.device)
    model = load_model(dense, options.dtype, device)
    calibration = random_calibration(model, options)
    clock, start = ForwardClock(device), time.perf_counter()
    with clock.running():
        pruned = prune(model, run_config(options, ratio), calibration, track=track)
    synchronise(device)
    seconds = time.perf_counter() - start
    pruned.save(out)
    return run_figures(pruned, ratio, seconds, clock)


def run_figures(pruned: Pruned, ratio: float, seconds: float, clock: ForwardClock) -> dict:
    """What a structured run took, and how much of that were forward passes."""
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
    """Checkpoint, pruning runs and benchmark; pictures go beside `out`."""
    sizes = (getattr(options, name) for name in SIZES)
    values = llada_values(*sizes, dtype=options.dtype or "float32")
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
        found = bench(checkpoints, settings, BenchOutput(folder / "bench", plots=out is not None), place, track)
    volume = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in VOLUME} | {
        "split": options.split
    }
    shape = {name: getattr(options, name) for name in SIZES}
    result = found.result | {"weights": "random", "shape": shape, "calibration": volume, "pruning": runs}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in (path for path in found.paths if path.suffix == ".png"):
            shutil.move(path, out.with_name(f"{out.stem}_{path.name}"))
        write_result(out, result)
    return result


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    for name, value in (SIZES | VOLUME | PACE | {"batch": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--ratios", default="0.3,0.5", help="to prune at (default %(default)s)")
    parser.add_argument("--split", default="by-cost", help="structured.split (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_argument("--device", help="cpu or cuda[:N] (default: cuda where there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default float32)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes by default; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=result_file, help=f"default {OUT}")
    if is_quick(arguments):
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    try:
        options.ratios = [float(part) for part in options.ratios.split(",")]
    except ValueError as error:
        raise UserError(f"--ratios '{options.ratios}' is no list of numbers: write them as in 0.3,0.5") from error
    if not 1 <= options.levels <= STEPS:
        raise UserError(f"--levels {options.levels}: give 1 to {STEPS}")
    if options.heads < 1 or options.width % (2 * options.heads):
        raise UserError(f"--width {options.width}: each of {options.heads} heads needs an even share")
    options.out = options.out or (None if options.quick else OUT)
    return options


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="bench-pruned-") as folder:
        result = measure(options, Path(folder), options.out)
    console = Console()
    for table in bench_tables(result):
        console.print(table)
    for row in result["pruning"]:
        share = f"{100 * row['forward_share']:.0f} % of them forward passes"
        console.print(f"pruning at {row['asked']}: {row['seconds']:.1f} s, {share}", soft_wrap=True)
    if options.out:
        console.print(f"Wrote {options.out}", soft_wrap=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_pruned", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
