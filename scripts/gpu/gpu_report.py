"""From a bare machine with one GPU and no network to figures at 8B size.

    python -m scripts.gpu.gpu_report --work DIR [--shape llada-8b] [--stages make,prune,forward,...]

The checkpoint has LLaDA-8B's (or Dream-7B's) exact shape and random weights: speed and memory depend only on the shape,
and the model's output has no meaning. Each stage writes one JSON file with a description of the machine;
`readme_tables.py` makes tables of them. `mass` and `widths` can run at any time, the other stages once `make` and
`prune` have filled the work directory, so that several short calls on one machine add up.

Stages
  make        the checkpoint
  prune       whole structured runs at 0.3 and 0.5: time, share of forward passes, peak memory above the weights
  forward     latency of forward passes, peak memory, parameters, MACs, bytes, share of the ideal saving
  generation  whole generations with recomputation, prefix and dual cache
  nm          2:4 weights on torch's kernels, per layer and end to end
  widths      the cost of MLP widths that are not multiples of 128
  mass        time of attention mass in addition to attention and to a block's forward pass, tiled and by FlexAttention
  sparsegpt   ours against a plain implementation (`sparsegpt_plain.py`)
  overlap     memory.overlap on and off: whether the weights are bit-equal, and the time of both

Calibration: random ids, as much of the published volume (128 windows x 4096 tokens x 10 levels) as fits
--prune-seconds and --sparsegpt-seconds according to a short pilot. The time of the full volume is extrapolated, and
marked so.

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
All: 530 s, below the 540 s of one call; no stage starts after --seconds. With 15 minutes on one machine, three calls of
240, 270 and 275 s give more calibration, torch.compile (100 s), and SparseGPT on all blocks:
  --stages make,prune --prune-seconds 80 | --stages forward,generation --compile
  --stages nm,widths,mass,sparsegpt,overlap --blocks 0 --sparsegpt-seconds 130
Whole generations of longer sequences than 512 tokens need a separate call (about 330 s: at 8 x 4096 tokens the three
models take 45 s for one generation each):
  --stages generation --generation-lengths 512,2048,4096 --generation-rounds 1

Packages: torch, transformers, rich, typer, psutil, PyYAML, and torch-pruning and pydantic, which GPU images often lack.
Bring these as wheels; on the GPU machine, in the repository, without datasets and network:
  pip download --no-deps -d wheels torch-pruning pydantic pydantic-core==VERSION annotated-types typing-inspection
  pip install --no-index --find-links wheels --no-deps --target site torch-pruning pydantic pydantic-core \\
    annotated-types typing-inspection && PYTHONPATH=.:site python -m scripts.gpu.gpu_report --work /tmp/gpu
(pydantic names the version of pydantic-core; for another Python than the one that downloads, add to pip download:
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

from scripts.bench.bench_pruned import STEPS, run_config
from scripts.gpu.gpu_common import PUBLISHED, RATIOS, at_volume, checkpoint, pruned_name, shape_family, shape_values
from scripts.gpu.gpu_masks import sparsegpt
from scripts.gpu.gpu_mass import mass
from scripts.gpu.gpu_overlap import overlap, overlap_lines
from scripts.gpu.gpu_pruning import prune
from scripts.gpu.gpu_stages import forward, generation, make, nm, widths
from scripts.tools.script_line import (
    OneLineParser,
    check_counts,
    first_read,
    flag,
    one_line,
    parse_numbers,
    show_result,
    write_result,
)
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
SIZES = {"batches": "1,8", "lengths": "512,2048,4096", "generation_lengths": "512"}
COUNTS = {"held_out": 1, "window": 4096, "levels": 10, "rounds": 5, "gen_length": 128, "steps": 16,
          "generation_rounds": 3}  # fmt: skip
# for the tiny shape, whose 128 positions and 2 blocks serve to try the script
TINY = {
    "batches": "1,2", "lengths": "32,64", "generation_lengths": "32", "generation_rounds": 1, "held_out": 1,
    "window": 16, "levels": 2, "rounds": 2, "gen_length": 8, "steps": 4, "prune_seconds": 1.0, "sparsegpt_seconds": 1.0,
}  # fmt: skip


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Checked options; `stages`, `batches` and `lengths` as sequences."""
    parser = OneLineParser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints, about 55 GB at 8B size")
    parser.add_argument("--shape", default="llada-8b", choices=[*PUBLISHED, "tiny"], help="default %(default)s")
    parser.add_argument("--stages", default=",".join(STAGES), help="default %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=495, help="no stage starts after so many seconds (default %(default)s)"
    )
    for name, sizes in SIZES.items():
        parser.add_argument(flag(name), default=sizes, help="default %(default)s")
    parser.add_counts(COUNTS)
    parser.add_argument("--windows", default="auto", help="of calibration; default: as many as the time allows")
    parser.add_argument("--prune-seconds", type=float, default=55, help="for each ratio (default %(default)s)")
    parser.add_argument("--sparsegpt-seconds", type=float, default=20, help="for both sides (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="of stage sparsegpt, 0 for all (default %(default)s)")
    parser.add_argument("--split", default="by-cost", help="structured.split (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_device()
    parser.add_argument("--dtype", help="default: the checkpoint's own on CUDA, float32 on CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default %(default)s)")
    if first_read(arguments, "shape") == "tiny":
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Parse lists and counts.

    Raises:
        UserError: a value that cannot be used.
    """
    options.stages = options.stages.split(",")
    for name in options.stages:
        if name not in STAGES:
            raise UserError(f"unknown stage '{name}'{nearest(name, list(STAGES))}: choose from {', '.join(STAGES)}")
    for name in SIZES:
        numbers = parse_numbers(flag(name), getattr(options, name))
        if min(numbers) < 1:
            raise UserError(f"{flag(name)} has {min(numbers)}: give numbers from 1, such as 1,8")
        setattr(options, name, tuple(numbers))
    if options.windows != "auto":
        if not (options.windows.isdecimal() and int(options.windows)):
            raise UserError(f"--windows '{options.windows}' is not a number from 1: give one, or auto")
        options.windows = int(options.windows)
    check_counts(options, COUNTS)
    check_counts(options, ("seconds", "prune_seconds", "sparsegpt_seconds", "blocks"), least=0)
    if options.levels > STEPS:
        raise UserError(f"--levels {options.levels}: give 1 to {STEPS}")
    shortest = min(options.generation_lengths)
    if shortest <= options.gen_length and "generation" in options.stages:
        raise UserError(
            f"--generation-lengths {shortest} leaves no prompt before --gen-length {options.gen_length}: raise it, or"
            " lower --gen-length"
        )
    pick_device(options.device)
    as_dtype(options.dtype)
    run_config(at_volume(options, {"windows": 1}, options.held_out), RATIOS[0])
    _check_shape(options)


def _check_shape(options: argparse.Namespace) -> None:
    """Raise UserError if a length is beyond the shape's positions, or a stage needs a missing checkpoint or package."""
    values = shape_values(options)
    positions = values[shape_family(values).keys["positions"]]
    most = {name: max(getattr(options, name)) for name in ("lengths", "generation_lengths")}
    for name, longest in (most | {"window": options.window}).items():
        if longest > positions:
            raise UserError(f"{flag(name)} {longest} is beyond the {positions} positions of {options.shape}: lower it")
    if "prune" in options.stages and importlib.util.find_spec("torch_pruning") is None:
        raise UserError("package 'torch-pruning' is missing: bring its wheel (see --help), or leave out stage prune")
    planned: set[str] = set()
    for stage in options.stages:
        for name in NEEDS.get(stage, ()):
            if name not in planned:
                checkpoint(options, name)
        planned |= MAKES.get(stage, set())


def run(options: argparse.Namespace) -> int:
    """Run the stages. A failure does not stop later stages, because a GPU may not be available again soon.

    Returns:
        Exit code, 1 if a stage failed.
    """
    start = time.perf_counter()
    failed: list[str] = []
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.stages:
        before = time.perf_counter() - start
        if before > options.seconds:
            show_result(f"{name} left out: {before:.0f} s have passed; run --stages {name} separately")
            continue
        try:
            with progress_bars() as track:
                result = STAGES[name](options, track)
        except UserError as error:
            print(f"gpu_report: {name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        except (RuntimeError, OSError):  # torch: out of memory, a failing kernel or compilation; a full disk
            traceback.print_exc()
            failed.append(name)
            continue
        finally:
            give_back()
        seconds = time.perf_counter() - start - before
        facts = {"shape": options.shape, "weights": "random", "stage_seconds": seconds, "machine": machine(options)}
        path = options.out / f"gpu_{options.shape}_{name}.json"
        write_result(path, result | facts)
        show_result(f"{name}: {seconds:.1f} s, wrote {path}", *summary(name, result))
    for name in failed:
        print(f"gpu_report: {name} failed (see above); its earlier result is unchanged", file=sys.stderr)
    return 1 if failed else 0


def give_back() -> None:
    """Free a stage's models before the next stage, also on the device."""
    gc.collect()
    give_back_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(options: argparse.Namespace) -> dict:
    """`describe_machine`, with the device's memory and the version of transformers."""
    device = pick_device(options.device)
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    facts = {"transformers": transformers.__version__, "device": str(device), "device_bytes": total}
    return describe_machine() | facts


def summary(name: str, result: dict) -> list[str]:
    """The lines to print after a stage."""
    if name == "overlap":
        return overlap_lines(result)
    if "calibration" not in result:
        return []
    size = result["calibration"]
    text = f"{size['windows']} windows x {size['window']} tokens x {size['levels']} levels"
    text = f"  calibration: {text}, {size['share_of_published']:.2g} of the published volume, {size['chosen']}"
    if size["extrapolated_full_seconds"] is not None:
        text += (
            f"; estimated {size['estimate_seconds']:.0f} s, took {size['took_seconds']:.0f} s; the full volume would"
        )
        text += f" take {size['extrapolated_full_seconds']:.0f} s (extrapolated)"
    if name == "sparsegpt":
        blocks = f"  {result['blocks']} of {result['of_blocks']} blocks"
        speed = f"ours {result['times_faster']:.2f} x faster (goal {result['wanted']})"
        return [text, f"{blocks}: {speed}, {result['agreement']['masks']:.2%} of the masks equal"]
    return [text]


def main(arguments: list[str] | None = None) -> int:
    return one_line("gpu_report", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
