"""From a bare machine with one GPU and no network to figures at 8B size.

    python -m scripts.gpu.gpu_report --work DIR [--shape llada-8b] [--stages make,prune,forward,...]

The checkpoint has LLaDA-8B's (or Dream-7B's) exact shape and random weights: speed and memory depend on shape alone,
and what the model says means nothing. Each stage writes one JSON file, with the machine described; `readme_tables.py`
makes tables of them. `forward`, `generation` and `widths` to `overlap` can be run alone once `make` and `prune` have
filled the work directory, `mass` and `widths` at any time, so that several short calls on one machine add up.

Stages
  make        the checkpoint
  prune       whole structured runs at 0.3 and 0.5: time, share of forward passes, peak memory above the weights
  forward     latency of forward passes, peak memory, parameters, MACs, bytes, share of the ideal saving
  generation  whole generations with recomputation, prefix and dual cache
  nm          2:4 weights on torch's kernels, per layer and end to end
  widths      what MLP widths that are no multiples of 128 cost
  mass        attention mass on top of attention and of a block's forward pass, tiled and by FlexAttention
  sparsegpt   ours against a straightforward implementation (`sparsegpt_plain.py`)
  overlap     memory.overlap on and off: whether the weights are bit-equal, and the time of either

Calibration: random ids, as much of the published volume (128 windows x 4096 tokens x 10 levels) as fits
--prune-seconds and --sparsegpt-seconds by a short pilot; what all of it would take is extrapolated and said to be.

Time on an H100, estimated and never measured: 450 TFLOP/s in bf16, 45 in fp32 (Gram matrices), 3 GB/s from or to disk.
  make 25 s: 16 GB drawn and written
  prune 170 s: 10 to load, 25 pilot, 2 x 55 (--prune-seconds), 2 x 10 to save. A block costs 2.3 s for both ratios
    (scores in fp64 1.5, refit solves 0.8), each noisy copy of 4096 tokens in it 0.22 s (Grams 0.1, passes 0.05, moves
    to and from the host 0.07)
  forward 75 s: 25 to load three models; a round of 60k tokens x 16 GFLOP x 2.3 (of three models) is 5 s, 5 rounds and
    5 passes more
  generation 95 s: 25 to load; 16 steps x 4608 tokens x 2.3 = 6 s recomputing, 3 s cached; 12 passes
  nm 45 s, widths 10 s, mass 30 s (compiling FlexAttention)
  sparsegpt 45 s at the 4 blocks of the default: 10 to load, 15 pilot, 20 (--sparsegpt-seconds)
  overlap 35 s: 10 to load; two blocks, twice, pruned (6), pruned from host memory and files (13) and by SparseGPT (6)
All: 530 s, below the 540 s of one call; no stage starts after --seconds. On one machine for 15 minutes, in three calls
of 240, 270 and 275 s: more calibration, torch.compile too (100 s), and SparseGPT on all blocks:
  --stages make,prune --prune-seconds 80 | --stages forward,generation --compile
  --stages nm,widths,mass,sparsegpt,overlap --blocks 0 --sparsegpt-seconds 130
Whole generations of longer sequences, instead of those of 512 tokens, take a call of their own (about 330 s: at 8 x
4096 tokens the three models take 45 s for one generation each):
  --stages generation --generation-lengths 512,2048,4096 --generation-rounds 1

Packages: torch, transformers, rich, typer, psutil, PyYAML, and torch-pruning and pydantic, which GPU images often lack.
Carry these as wheels; there, with the repository as working directory, no datasets and no network:
  pip download --no-deps -d wheels torch-pruning pydantic pydantic-core==VERSION annotated-types typing-inspection
  pip install --no-index --find-links wheels --no-deps --target site torch-pruning pydantic pydantic-core \\
    annotated-types typing-inspection && PYTHONPATH=.:site python -m scripts.gpu.gpu_report --work /tmp/gpu
(pydantic names the pydantic-core it wants; for another Python than the one that downloads, say which to pip download:
--only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64.)
"""

import argparse
import gc
import importlib.util
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers
from rich.console import Console

from scripts.bench.bench_pruned import STEPS, run_config
from scripts.gpu.gpu_common import PUBLISHED, RATIOS, at_volume, made, pruned_name, shape_family, shape_values
from scripts.gpu.gpu_masks import sparsegpt
from scripts.gpu.gpu_mass import mass
from scripts.gpu.gpu_overlap import overlap, overlap_lines
from scripts.gpu.gpu_pruning import prune
from scripts.gpu.gpu_stages import forward, generation, make, nm, widths
from scripts.tools.script_line import OneLineParser, first_read, one_line, write_result
from structprune.bench.machine import describe_machine
from structprune.cli.console import progress_bars
from structprune.errors import UserError, nearest
from structprune.models.loading import as_dtype
from structprune.models.placement import give_back_memory, pick_device

RESULTS = Path(__file__).parents[1] / "results"
STAGES = {each.__name__: each for each in (make, prune, forward, generation, nm, widths, mass, sparsegpt, overlap)}
MAKES = {"make": {"dense"}, "prune": {pruned_name(ratio) for ratio in RATIOS}}
NEEDS = dict.fromkeys(("prune", "nm", "sparsegpt", "overlap"), ["dense"])
NEEDS |= dict.fromkeys(("forward", "generation"), ["dense", *map(pruned_name, RATIOS)])
SIZES = {"batches": "1,8", "lengths": "512,2048,4096", "generation-lengths": "512"}
COUNTS = {"held-out": 1, "window": 4096, "levels": 10, "rounds": 5, "gen-length": 128, "steps": 16,
          "generation-rounds": 3}  # fmt: skip
# what fits the tiny shape, whose 128 positions and 2 blocks are for trying the script out
TINY = {
    "batches": "1,2", "lengths": "32,64", "generation_lengths": "32", "generation_rounds": 1, "held_out": 1,
    "window": 16, "levels": 2, "rounds": 2, "gen_length": 8, "steps": 4, "prune_seconds": 1.0, "sparsegpt_seconds": 1.0,
}  # fmt: skip


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Checked options; `stages`, `batches` and `lengths` as sequences."""
    parser = OneLineParser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, about 55 GB at 8B size")
    parser.add_argument("--shape", default="llada-8b", choices=[*PUBLISHED, "tiny"], help="default %(default)s")
    parser.add_argument("--stages", default=",".join(STAGES), help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=495, help="no stage starts after (default %(default)s)")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", default=value, help="default %(default)s")
    for name, value in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--windows", default="auto", help="of calibration; default as many as the time allows")
    parser.add_argument("--prune-seconds", type=float, default=55, help="a ratio's run (default %(default)s)")
    parser.add_argument("--sparsegpt-seconds", type=float, default=20, help="both sides (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="of sparsegpt, 0 for all (default %(default)s)")
    parser.add_argument("--split", default="by-cost", help="structured.split (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_argument("--device", help="cpu or cuda[:N] (default: cuda where there is one)")
    parser.add_argument("--dtype", help="default: the checkpoint's own on CUDA, float32 on CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default %(default)s)")
    if first_read(arguments, "shape") == "tiny":
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Turn lists and counts from text.

    Raises:
        UserError: a value that cannot be used.
    """
    options.stages = options.stages.split(",")
    for name in options.stages:
        if name not in STAGES:
            raise UserError(f"unknown stage '{name}'{nearest(name, list(STAGES))}: choose of {', '.join(STAGES)}")
    for name in SIZES:
        text = getattr(options, name.replace("-", "_"))
        parts = text.split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            raise UserError(f"--{name} '{text}' is no list of numbers from 1: write them as in 1,8")
        setattr(options, name.replace("-", "_"), tuple(map(int, parts)))
    if options.windows != "auto":
        if not (options.windows.isdecimal() and int(options.windows)):
            raise UserError(f"--windows '{options.windows}' is no number from 1: give one, or auto")
        options.windows = int(options.windows)
    for name in (*COUNTS, "seconds", "prune-seconds", "sparsegpt-seconds", "blocks"):
        value, least = getattr(options, name.replace("-", "_")), int(name in COUNTS)
        if value < least:
            raise UserError(f"--{name} {value}: give at least {least}")
    if options.levels > STEPS:
        raise UserError(f"--levels {options.levels}: give 1 to {STEPS}")
    shortest = min(options.generation_lengths)
    if shortest <= options.gen_length and "generation" in options.stages:
        raise UserError(
            f"--generation-lengths {shortest} leaves no prompt before --gen-length {options.gen_length}: raise the one"
        )
    pick_device(options.device)
    as_dtype(options.dtype)
    run_config(at_volume(options, {"windows": 1}, options.held_out), RATIOS[0])
    _check_shape(options)


def _check_shape(options: argparse.Namespace) -> None:
    """Raise UserError where a length is beyond the shape's positions, or a stage lacks what an earlier one makes."""
    values = shape_values(options)
    positions = values[shape_family(values).keys["positions"]]
    most = {name: max(getattr(options, name.replace("-", "_"))) for name in ("lengths", "generation-lengths")}
    for name, longest in (most | {"window": options.window}).items():
        if longest > positions:
            raise UserError(f"--{name} {longest} is beyond the {positions} positions of {options.shape}: lower it")
    if "prune" in options.stages and importlib.util.find_spec("torch_pruning") is None:
        raise UserError("package 'torch-pruning' is not here: carry its wheel (see --help), or leave out stage prune")
    coming: set[str] = set()
    for stage in options.stages:
        for name in NEEDS.get(stage, ()):
            if name not in coming:
                made(options, name)
        coming |= MAKES.get(stage, set())


def run(options: argparse.Namespace) -> int:
    """Exit code 1 where a stage failed; those after it are run all the same, for a GPU may not be had again soon."""
    start, console, failed = time.perf_counter(), Console(), []
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.stages:
        gone = time.perf_counter() - start
        if gone > options.seconds:
            console.print(f"{name} left out: {gone:.0f} s are gone; run --stages {name} on its own", soft_wrap=True)
            continue
        try:
            with progress_bars() as track:
                found = STAGES[name](options, track)
        except UserError as error:
            print(f"gpu_report: {name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        except (RuntimeError, OSError):  # torch's: out of memory, a kernel or a compilation that fails; a full disk
            traceback.print_exc()
            failed.append(name)
            continue
        finally:
            give_back()
        took = time.perf_counter() - start - gone
        about = {"shape": options.shape, "weights": "random", "stage_seconds": took, "machine": machine(options)}
        path = options.out / f"gpu_{options.shape}_{name}.json"
        write_result(path, found | about)
        for line in (f"{name}: {took:.1f} s, wrote {path}", *summary(name, found)):
            console.print(line, soft_wrap=True)
    for name in failed:
        print(f"gpu_report: {name} failed (see above), its result is as it was", file=sys.stderr)
    return 1 if failed else 0


def give_back() -> None:
    """Let go of a stage's models before the next, on the device too."""
    gc.collect()
    give_back_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(options: argparse.Namespace) -> dict:
    """What it ran on, with the device's memory and the version of transformers."""
    device, found = pick_device(options.device), describe_machine() | {"transformers": transformers.__version__}
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return found | {"device": str(device), "device_bytes": total}


def summary(name: str, found: dict) -> list[str]:
    """What is said of a stage at once."""
    if name == "overlap":
        return overlap_lines(found)
    if "calibration" not in found:
        return []
    size = found["calibration"]
    text = f"{size['windows']} windows x {size['window']} tokens x {size['levels']} levels"
    text = f"  calibration: {text}, {size['share_of_published']:.2g} of the published volume, {size['chosen']}"
    if size["extrapolated_full_seconds"] is not None:
        text += f"; estimated {size['estimate_seconds']:.0f} s, took {size['took_seconds']:.0f} s; all of it"
        text += f" {size['extrapolated_full_seconds']:.0f} s (extrapolated)"
    if name == "sparsegpt":
        return [text, f"  {found['blocks']} of {found['of_blocks']} blocks: ours {found['times_faster']:.2f} x faster"
                f" (wanted {found['wanted']}), {found['agreement']['masks']:.2%} of the masks equal"]  # fmt: skip
    return [text]


def main(arguments: list[str] | None = None) -> int:
    return one_line("gpu_report", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
