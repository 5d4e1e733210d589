"""From a bare machine with one GPU and no network to figures at 8B size: pruning, latency, generation, 2:4, widths.

    python scripts/gpu_report.py --work DIR [--shape llada-8b] [--stages make,prune,forward,generation,nm,widths,mass]

The checkpoint has LLaDA-8B's (or Dream-7B's) exact shape and random weights: speed and memory depend on shape alone,
and what the model says means nothing. Each stage writes one JSON file beside the others, with the machine described,
and can be run alone once `make` and `prune` have filled the work directory, so that several short calls add up. A stage
does not start after --seconds, so that one call ends in time.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_pruned import prune_once
from bench_widths import main as bench_widths
from measure_inspect import SHAPES
from random_checkpoint import llada_values, write_random
from rich.console import Console
from script_line import OneLineParser, one_line, write_result

from structprune.bench.latency import interleaved
from structprune.bench.machine import describe_machine
from structprune.bench.settings import BenchSettings
from structprune.bench_run import bench
from structprune.config import Config, ModelSettings
from structprune.errors import UserError, nearest
from structprune.mask_pipeline import mask
from structprune.models.families import FAMILIES
from structprune.models.loading import load_model
from structprune.models.placement import pick_device
from structprune.report.progress import progress_bars
from structprune.statistics.flex_mass import attend_with_flex_mass
from structprune.statistics.sinks import attention_mass

RESULTS = Path(__file__).parent / "results"
PUBLISHED = {"llada-8b": SHAPES["LLaDA-8B"], "dream-7b": SHAPES["Dream-7B"]}
TINY = llada_values(64, 4, 2, 128, 256, 128, "float32")
RATIOS = (0.3, 0.5)
MASKS = {
    "method": "nm", "masking.nm": "2:4", "masking.score": "magnitude", "reconstruct.enabled": False,
    "calibration.held_out": 0,
}  # fmt: skip


def make(options: argparse.Namespace, track) -> dict:
    start = time.perf_counter()
    values = TINY if options.shape == "tiny" else PUBLISHED[options.shape]
    write_random(options.work / "dense", values, device=str(pick_device(options.device)))
    size = sum(path.stat().st_size for path in (options.work / "dense").glob("*.safetensors"))
    return {"seconds": time.perf_counter() - start, "bytes": size}


def prune(options: argparse.Namespace, track) -> dict:
    """Whole structured runs, with the share of each that is model forwards."""
    runs = [prune_once(_made(options, "dense"), _pruned(options, r), r, options, track) for r in RATIOS]
    volume = {name: getattr(options, name) for name in ("windows", "held_out", "window", "levels", "split")}
    return {"calibration": volume, "runs": runs}


def forward(options: argparse.Namespace, track) -> dict:
    settings = BenchSettings(
        options.batches, options.lengths, gen_length=0, compiled=options.compile, rounds=options.rounds
    )
    return _bench(options, settings, track)


def generation(options: argparse.Namespace, track) -> dict:
    """At the shortest length: recomputation and both caches cost the same number of steps at any."""
    sizes = (options.batches, options.lengths[:1], options.gen_length, options.steps)
    settings = BenchSettings(*sizes, caches=("all",), rounds=options.rounds, generation_rounds=3)
    return _bench(options, settings, track)


def nm(options: argparse.Namespace, track) -> dict:
    """A 2:4-masked checkpoint on torch's kernels: layer by layer, and whole passes."""
    masked = options.work / "2of4"
    if not masked.exists():
        model = load_model(_made(options, "dense"), options.dtype or "auto", pick_device(options.device))
        mask(model, Config.load(overrides=MASKS), track=track, in_place=True).save(masked)
    sizes = (options.batches, options.lengths[:1])
    settings = BenchSettings(*sizes, gen_length=0, semi_structured=True, rounds=options.rounds)
    return _bench(options, settings, track, [str(masked)])


def widths(options: argparse.Namespace, track) -> dict:
    made = options.work / "widths.json"
    chosen = ["--quick"] if options.shape == "tiny" else ["--hidden", "4096", "--centres", "4096,6144,8192"]
    chosen += ["--tokens", "2048", "--out", str(made)]
    chosen += [] if options.device is None else ["--device", options.device]
    if code := bench_widths(chosen):
        raise UserError(f"widths ended with code {code}")
    return json.loads(made.read_text())


def mass(options: argparse.Namespace, track) -> dict:
    """Attention mass on top of attention, on random queries and keys of the model's shape: tiled, and FlexAttention's.

    Which of them is faster, and by how much attention alone is, decides what a GPU should use; needs no checkpoint.
    """
    device, values = pick_device(options.device), TINY if options.shape == "tiny" else PUBLISHED[options.shape]
    config = next(each for each in FAMILIES if values["model_type"] in each.model_types).width_keys
    heads, kv_heads = values[config["query_heads"]], values.get(config["kv_heads"]) or values[config["query_heads"]]
    size = values.get("d_model", values.get("hidden_size")) // heads
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    rows = []
    for batch, length in track([(b, n) for b in options.batches for n in options.lengths], "attention mass"):
        generator = torch.Generator(device).manual_seed(0)
        query, key, value = (
            torch.randn(batch, count, length, size, generator=generator, device=device, dtype=dtype)
            for count in (heads, kv_heads, kv_heads)
        )  # (B, H, T, D), 2 x (B, K, T, D)
        calls = {
            "attention": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=heads != kv_heads),
            "tiled mass": lambda: attention_mass(query, key),
            "attention and mass, flex": lambda: attend_with_flex_mass(query, key, value),
        }
        found = interleaved(calls, device, options.rounds, warmup=3)
        gap = (calls["attention and mass, flex"]()[1] - calls["tiled mass"]()).abs().max().item()
        times = {name: latency.median_ms for name, latency in found.items()}
        rows.append({"batch": batch, "length": length, "median_ms": times, "largest_difference": gap})
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": size, "dtype": str(dtype), "rows": rows}


STAGES = {each.__name__: each for each in (make, prune, forward, generation, nm, widths, mass)}


def _pruned(options: argparse.Namespace, ratio: float) -> Path:
    return options.work / f"pruned-{ratio}"


def _made(options: argparse.Namespace, name: str) -> Path:
    """What an earlier stage left.

    Raises:
        UserError: it did not.
    """
    path = options.work / name
    if not path.exists():
        raise UserError(f"'{path}' is not there: run --stages make,prune first, with the same --work")
    return path


def _bench(options: argparse.Namespace, settings: BenchSettings, track, checkpoints: list[str] | None = None) -> dict:
    names = ("dense", *(f"pruned-{ratio}" for ratio in RATIOS))
    checkpoints = checkpoints or [str(_made(options, name)) for name in names]
    place = ModelSettings(device=options.device, dtype=options.dtype)
    return bench(checkpoints, settings, options.work / "bench", place, plots=False, overwrite=True, track=track).result


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, about 55 GB at 8B size")
    parser.add_argument("--shape", default="llada-8b", choices=[*PUBLISHED, "tiny"], help="default %(default)s")
    parser.add_argument("--stages", default=",".join(STAGES), help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=480, help="no stage starts after (default %(default)s)")
    for name, value in {"batches": "1,8", "lengths": "512,2048,4096"}.items():
        parser.add_argument(f"--{name}", default=value, help="default %(default)s")
    volume = {"windows": 8, "held-out": 2, "window": 1024, "levels": 5}
    for name, value in (volume | {"rounds": 10, "gen-length": 128, "steps": 32}).items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--split", default="by-cost", help="structured.split (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_argument("--device", help="cpu or cuda[:N] (default: cuda where there is one)")
    parser.add_argument("--dtype", help="default: the checkpoint's own on CUDA, float32 on CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default %(default)s)")
    options = parser.parse_args(arguments)
    options.stages = options.stages.split(",")
    for name in options.stages:
        if name not in STAGES:
            raise UserError(f"unknown stage '{name}'{nearest(name, list(STAGES))}: choose of {', '.join(STAGES)}")
    for name in ("batches", "lengths"):
        try:
            setattr(options, name, tuple(int(part) for part in getattr(options, name).split(",")))
        except ValueError as error:
            raise UserError(
                f"--{name} '{getattr(options, name)}' is no list of numbers: write them as in 1,8"
            ) from error
    pick_device(options.device)
    return options


def run(options: argparse.Namespace) -> int:
    start, console = time.perf_counter(), Console()
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.stages:
        gone = time.perf_counter() - start
        if gone > options.seconds:
            console.print(f"{name} left out: {gone:.0f} s are gone; run --stages {name} on its own", soft_wrap=True)
            continue
        with progress_bars(Console(stderr=True)) as track:
            found = STAGES[name](options, track)
        took = time.perf_counter() - start - gone
        about = {"shape": options.shape, "weights": "random", "stage_seconds": took, "machine": describe_machine()}
        path = options.out / f"gpu_{options.shape}_{name}.json"
        write_result(path, found | about)
        console.print(f"{name}: {took:.1f} s, wrote {path}", soft_wrap=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return one_line("gpu_report", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
