"""Sink-Wanda, SparseGPT and sink-SparseGPT against the paper authors' release: time, peak memory, equal outputs.

    python -m scripts.bench.bench_masking --published DIR --python ENVIRONMENT/bin/python [--quick] [--out FILE]

DIR is a checkout of the release, ENVIRONMENT a virtual environment that can import it (transformers 4.49). Both sides
prune the same random checkpoint in LLaDA's layout, in fp32 on CPU, with the same windows and the same noise. Each run
has a fresh process, and the sides take turns; only the pruning call is timed. Ratios are medians over rounds. Then both
are compared with fp64. Also measured is the minimum that sink-Wanda needs: one forward pass for every window and level,
in the same process and batch size, one after each of its own. Without --published only ours is measured. Run it on an
idle machine; --quick takes a minute and only shows that everything works.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from safetensors.torch import save_file

from scripts.bench.masking_agreement import DIFFERENCES, ITSELF, agreements
from scripts.bench.published_worker import CALLS, WANDA_WINDOWS
from scripts.tools.random_checkpoint import LLADA, SHARP
from scripts.tools.script_line import (
    OneLineParser,
    check_counts,
    one_line,
    result_file,
    run_json,
    show_result,
    warn_if_busy,
    write_result,
)
from structprune.bench.machine import describe_machine
from structprune.calibration.noise import level_times, noise_windows
from structprune.cli.console import progress_bars
from structprune.errors import UserError
from structprune.models.configuration_structprune import StructpruneLLaDAConfig
from structprune.models.modeling_structprune import StructpruneLLaDA

ROOT = Path(__file__).parents[2]
OUT = ROOT / "scripts" / "results" / "masking_speed.json"
FORWARDS = "encode"  # the worker's name for sink-Wanda with the forward passes that it needs at least
INTERVAL = 5  # the released schedule: every fifth of 50 steps is a level
GOALS = {"sink-wanda": 1.8, "sparsegpt": 1.7, "sink-sparsegpt": 1.5}  # times faster than the release
MEMORY_GOAL, FORWARDS_GOAL = 0.8, 1.2  # at most this times the release's peak; this times the bare passes
QUICK = {"blocks": 2, "width": 128, "heads": 2, "vocabulary": 512, "length": 64, "windows": 4, "levels": 2, "rounds": 2}
CONFIG = LLADA | dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0)
CONFIG |= dict.fromkeys(("alibi", "flash_attention", "use_cache"), False) | {"torch_dtype": "float32"}


def write_checkpoint(directory: Path, options: argparse.Namespace) -> None:
    """Random weights in LLaDA's layout, MLP three times the width; attention about as uneven as in a trained model."""
    sizes = {"d_model": options.width, "n_heads": options.heads, "n_kv_heads": options.heads}
    sizes |= {"n_layers": options.blocks, "mlp_hidden_size": 3 * options.width, "max_sequence_length": options.length}
    sizes |= dict.fromkeys(("vocab_size", "embedding_size"), options.vocabulary)
    sizes |= {"mask_token_id": options.vocabulary - 1} | dict.fromkeys(("eos_token_id", "pad_token_id"), 0)
    constants = {key: CONFIG[key] for key in ("rope_theta", "rms_norm_eps")}
    config = StructpruneLLaDAConfig(**sizes, **constants)
    torch.manual_seed(0)
    model = StructpruneLLaDA(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            gain = SHARP if "q_proj" in name or "k_proj" in name else 1.0
            torch.nn.init.normal_(parameter, std=0.06 if "wte" in name else gain * parameter.shape[1] ** -0.5)
    directory.mkdir()
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG | sizes), encoding="utf-8")


def write_data(path: Path, options: argparse.Namespace) -> None:
    """Random windows and their noisy copies, level by level."""
    generator, mask_id = torch.Generator().manual_seed(0), options.vocabulary - 1
    ids = torch.randint(mask_id, (options.windows, options.length), generator=generator)  # (N, T)
    times = level_times(INTERVAL * options.levels, INTERVAL)  # (S,)
    noisy, _ = noise_windows(ids, mask_id, "levels", generator, times)  # (N, S, T)
    save_file({"ids": ids, "noisy": noisy.contiguous()}, path)


def run_worker(side: str, method: str, options: argparse.Namespace, folder: Path) -> dict:
    """Figures of one pruning call in a fresh process, which writes its linears into `folder`."""
    request = {
        "checkpoint": str(folder / "checkpoint"), "data": str(folder / "data.safetensors"), "method": method,
        "ratio": options.ratio, "steps": INTERVAL * options.levels, "interval": INTERVAL, "threads": options.threads,
        "out": str(folder / f"{method}-{side}.safetensors"),
    }  # fmt: skip
    path = folder / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    if side in ("release", ITSELF):
        command = [options.python, "-m", "scripts.bench.published_worker", options.published, path]
    else:
        command = [sys.executable, "-m", "scripts.bench.masking_worker", path, str(options.batch)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    remedy = "leave it out of --methods, or check --published and --python"
    return run_json(command, f"{method} of {side} failed", remedy, env=environment, cwd=ROOT)


def plan_rounds(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(method, side) of every run, the sides of a method in turns; SparseGPT is fast and gets two more rounds."""
    runs = []
    for method in options.methods:
        sides = ["ours"] + ["release"] * bool(options.published) + [FORWARDS] * (method == "sink-wanda")
        rounds = options.rounds + 2 * (method == "sparsegpt" and not options.quick)
        runs += [(method, side) for _ in range(rounds) for side in sides]
    return runs


def spread(values: list[float]) -> dict:
    """Median and range."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def summarise(method: str, figures: dict[str, list[dict]]) -> dict:
    """Medians of every side of a method, and ratios round by round; sides with unknown bytes are left out of those."""
    passes = figures.get(FORWARDS, [])
    sides = {side: rounds for side, rounds in figures.items() if side != FORWARDS}
    seconds = {side: [each["seconds"] for each in rounds] for side, rounds in sides.items()}
    seconds |= {FORWARDS: [each["forwards"] for each in passes]} if passes else {}
    peaks = {side: [each["peak_bytes"] for each in rounds] for side, rounds in sides.items()}
    peaks = {side: values for side, values in peaks.items() if None not in values}
    row = {
        "method": method,
        "seconds": {side: spread(values) | {"rounds": values} for side, values in seconds.items()},
        "peak_bytes": {side: spread(values) for side, values in peaks.items()},
    }
    if passes:
        row["over_forwards"] = spread([each["seconds"] / each["forwards"] for each in passes])
    if "release" in seconds:
        row["times_faster"] = spread([a / b for a, b in zip(seconds["release"], seconds["ours"], strict=True)])
    if {"ours", "release"} <= peaks.keys():
        row["memory_ratio"] = median(peaks["ours"]) / max(1, median(peaks["release"]))
    return row


def result_table(rows: list[dict], options: argparse.Namespace) -> Table:
    size = f"{options.blocks} blocks of {options.width}, {options.windows} windows of {options.length}"
    table = Table(title=f"{size}, {options.levels} levels, {options.threads} threads")
    for name in ("method", "ours s", "release s", "faster (range)", "goal", "ours MB", "release MB", "memory"):
        table.add_column(name, justify="right")
    for name in ("over its passes", "masks differ", "in block 0", "outputs differ", "misplaced: ours", "release"):
        table.add_column(name, justify="right")
    for row in rows:
        faster, agreement, over = (row.get(key) for key in ("times_faster", "agreement", "over_forwards"))
        table.add_row(
            row["method"],
            *_by_side(row["seconds"], 1, ".2f"),
            _ranged(faster) if faster else "",
            f"{GOALS[row['method']]} x" if row["method"] in GOALS else "",
            *_by_side(row["peak_bytes"], 1e6, ".0f"),
            f"{row['memory_ratio']:.2f} x" if "memory_ratio" in row else "",
            _ranged(over) if over else "",
            *(f"{agreement[name]:.1e}" if agreement else "" for name in DIFFERENCES),
            *(f"{agreement['against_fp64'][s]['misplaced']:.1e}" if agreement else "" for s in ("ours", "release")),
        )
    table.caption = f"goals: memory at most {MEMORY_GOAL} x; sink-Wanda at most {FORWARDS_GOAL} x its forward passes"
    agreements = [row.get("agreement", {}) for row in rows]
    if itself := [each["release_itself"] for each in agreements if "release_itself" in each]:
        differences = ", ".join(f"{itself[0][name]:.1e}" for name in DIFFERENCES)
        table.caption += f"; the release's SparseGPT on another number of threads differs from itself by {differences}"
    return table


def _by_side(figures: dict, unit: float, form: str) -> list[str]:
    return [f"{figures[side]['median'] / unit:{form}}" if side in figures else "" for side in ("ours", "release")]


def _ranged(value: dict) -> str:
    return f"{value['median']:.2f} x ({value['low']:.2f} to {value['high']:.2f})"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Checked options, `methods` as a list."""
    parser = OneLineParser(__doc__)
    parser.add_argument("--published", type=Path, help="checkout of the release (default: measure only ours)")
    parser.add_argument(
        "--release-commit", help="recorded in the result (default: the commit of --published if it is a git checkout)"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="Python of the release's environment (default: this one)"
    )
    parser.add_argument("--methods", default=",".join(GOALS), help=f"from {', '.join(CALLS)} (default %(default)s)")
    sizes = {"blocks": 8, "width": 512, "heads": 8, "vocabulary": 4096, "length": 512, "windows": 8, "levels": 10}
    parser.add_counts(sizes | {"rounds": 3, "threads": 2, "batch": 1})
    parser.add_argument("--ratio", type=float, default=0.5, help="of the weights of every linear (default %(default)s)")
    parser.add_quick()
    parser.add_argument("--out", type=result_file, help=f"default {OUT}")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    options.methods = options.methods.split(",")
    unknown = [name for name in options.methods if name not in CALLS]
    if unknown:
        raise UserError(f"--methods '{unknown[0]}' is none of {', '.join(CALLS)}")
    check_counts(options, (*sizes, "rounds", "threads", "batch"))
    if options.width % (2 * options.heads):
        raise UserError(f"--width = {options.width}: each of {options.heads} heads needs an even share")
    if not 0 < options.ratio < 1:
        raise UserError(f"--ratio = {options.ratio}: give a number between 0 and 1")
    if "wanda" in options.methods and options.windows > WANDA_WINDOWS:
        raise UserError(f"--windows = {options.windows}: the release's Wanda holds at most {WANDA_WINDOWS}")
    if options.published and not (options.published / "lib" / "prune_llada.py").is_file():
        raise UserError(
            f"--published {options.published} has no lib/prune_llada.py, so it is not a checkout of the release"
        )
    options.out = options.out or (None if options.quick else OUT)
    return options


def measure(options: argparse.Namespace, folder: Path) -> list[dict]:
    """A row of figures for every method."""
    write_checkpoint(folder / "checkpoint", options)
    write_data(folder / "data.safetensors", options)
    figures: dict[str, dict[str, list[dict]]] = {method: {} for method in options.methods}
    with progress_bars() as track:
        for method, side in track(plan_rounds(options), "pruning"):
            name = FORWARDS if side == FORWARDS else method
            figures[method].setdefault(side, []).append(run_worker(side, name, options, folder))
    rows = [summarise(method, sides) for method, sides in figures.items()]
    if not options.published:
        return rows
    by_method = agreements(options, folder, run_worker)
    return [row | {"agreement": by_method[row["method"]]} for row in rows]


def identify(options: argparse.Namespace) -> dict:
    """Which release was measured: SHA-256 of its code, and its commit if that is known."""
    commit = options.release_commit
    command = ["git", "-C", str(options.published), "rev-parse", "-q", "--verify", "HEAD"]
    if commit is None and (options.published / ".git").exists():
        with suppress(OSError):  # git is not installed
            commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    digest = hashlib.sha256((options.published / "lib" / "prune_llada.py").read_bytes()).hexdigest()
    return {"release_commit": commit, "release_sha256": digest}


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    load = warn_if_busy("bench_masking")
    names = ("blocks", "width", "heads", "vocabulary", "length", "windows", "levels", "ratio", "rounds", "batch")
    settings = {name: getattr(options, name) for name in names} | {"dtype": "float32", "load_before": load}
    settings |= identify(options) if options.published else {}
    with tempfile.TemporaryDirectory(prefix="bench-masking-") as folder:
        rows = measure(options, Path(folder))
    if not all("ours" in row["peak_bytes"] for row in rows):
        print("bench_masking: peak memory cannot be reset here, so none is given", file=sys.stderr)
    if options.out:
        write_result(options.out, {"machine": describe_machine(), "settings": settings, "rows": rows})
    show_result(result_table(rows, options), out=options.out, width=180)
    wrong = [row["method"] for row in rows if options.published and not row["agreement"]["agree"]]
    if wrong:
        print(f"bench_masking: ours differs from fp64 by more than rounding for {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_masking", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
