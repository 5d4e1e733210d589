"""The stages of gpu_report that make the checkpoint and measure latency, generation, 2:4 kernels and widths."""

import argparse
import json
import time

from scripts.bench.bench_widths import main as bench_widths
from scripts.gpu.gpu_common import RATIOS, checkpoint, pruned_name, shape_values
from scripts.tools.random_checkpoint import write_random
from structprune.bench.settings import BenchSettings
from structprune.config import Config, ModelSettings
from structprune.errors import UserError
from structprune.models.loading import load_model
from structprune.models.placement import pick_device
from structprune.runs.bench import BenchOutput, bench
from structprune.runs.mask import mask

MASKS = {
    "method": "nm", "masking.nm": "2:4", "masking.score": "magnitude", "reconstruct.enabled": False,
    "calibration.held_out": 0,
}  # fmt: skip


def make(options: argparse.Namespace, track) -> dict:
    start = time.perf_counter()
    write_random(options.work / "dense", shape_values(options), device=str(pick_device(options.device)))
    size = sum(path.stat().st_size for path in (options.work / "dense").glob("*.safetensors"))
    return {"seconds": time.perf_counter() - start, "bytes": size}


def forward(options: argparse.Namespace, track) -> dict:
    settings = BenchSettings(
        options.batches, options.lengths, gen_length=0, compiled=options.compile, rounds=options.rounds
    )
    return _bench(options, settings, track)


def generation(options: argparse.Namespace, track) -> dict:
    """Whole generations with full recomputation and both caches."""
    sizes = (options.batches, options.generation_lengths, options.gen_length, options.steps)
    rounds = {"rounds": options.rounds, "generation_rounds": options.generation_rounds}
    return _bench(options, BenchSettings(*sizes, caches=("all",), compiled=options.compile, **rounds), track)


def nm(options: argparse.Namespace, track) -> dict:
    """A 2:4-masked checkpoint on torch's kernels: single layers, and whole passes."""
    masked = options.work / "2of4"
    if not masked.exists():
        model = load_model(checkpoint(options, "dense"), options.dtype or "auto", pick_device(options.device))
        mask(model, Config.load(overrides=MASKS), track=track, in_place=True).save(masked)
    sizes = (options.batches, (min(options.lengths),))
    settings = BenchSettings(*sizes, gen_length=0, semi_structured=True, rounds=options.rounds)
    return _bench(options, settings, track, [str(masked)])


def widths(options: argparse.Namespace, track) -> dict:
    path = options.work / "widths.json"
    arguments = ["--quick"] if options.shape == "tiny" else ["--hidden", "4096", "--centres", "4096,6144,8192"]
    arguments += ["--tokens", "2048", "--out", str(path)]
    arguments += [] if options.device is None else ["--device", options.device]
    if code := bench_widths(arguments):
        raise UserError(f"widths ended with code {code}")
    return json.loads(path.read_text())


def _bench(options: argparse.Namespace, settings: BenchSettings, track, checkpoints: list[str] | None = None) -> dict:
    names = ("dense", *map(pruned_name, RATIOS))
    checkpoints = checkpoints or [str(checkpoint(options, name)) for name in names]
    place = ModelSettings(device=options.device, dtype=options.dtype)
    output = BenchOutput(options.work / "bench", plots=False, overwrite=True)
    return bench(checkpoints, settings, output, place, track).result
