"""Sink-Wanda, SparseGPT and sink-SparseGPT against the paper authors' release: wall time, peak memory, same outputs.

    python -m scripts.bench.bench_masking --published DIR --python ENVIRONMENT/bin/python [--quick] [--out FILE]

DIR is a checkout of the release, ENVIRONMENT one that can import it (transformers 4.49). Both sides prune the same
random checkpoint in LLaDA's layout, in fp32 on CPU, with the same windows and the same noise, each run in a fresh
process, in turns; only the pruning call is timed. Ratios are medians over rounds. Then both are held against fp64.
Beside them, what sink-Wanda cannot do without: one forward pass for every window and level, in the same process and
batch, one after each of its own. Without --published ours is measured alone. Run it on a machine that does nothing
else; --quick takes a minute and shows only that everything works.
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
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from scripts.bench.masking_agreement import DIFFERENCES, ITSELF, agreements
from scripts.bench.published_worker import CALLS, WANDA_WINDOWS
from scripts.tools.script_line import OneLineParser, one_line, result_file, write_result
from structprune.bench.machine import describe_machine
from structprune.calibration.noise import noise_windows
from structprune.cli.console import progress_bars
from structprune.errors import UserError
from structprune.models.configuration_structprune import StructpruneLLaDAConfig
from structprune.models.modeling_structprune import StructpruneLLaDA

ROOT = Path(__file__).parents[2]
OUT = ROOT / "scripts" / "results" / "masking_speed.json"
FORWARDS = "encode"  # the worker's name for sink-Wanda among the passes that it cannot avoid
INTERVAL = 5  # the released schedule: every fifth of 50 steps is a level
WANTED = {"sink-wanda": 1.8, "sparsegpt": 1.7, "sink-sparsegpt": 1.5}  # times faster than the release
WANTED_MEMORY, WANTED_FORWARDS = 0.8, 1.2  # at most so many times the release's peak; times the bare passes
QUICK = {"blocks": 2, "width": 128, "heads": 2, "vocabulary": 512, "length": 64, "windows": 4, "levels": 2, "rounds": 2}
# Of queries and keys: sinks are then about as many as in a trained model (in the demo's, 5% of the rows weigh less).
SHARP = 2.0
CONFIG = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "activation_type": "silu", "block_type": "llama",
    "layer_norm_type": "rms", "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "include_bias": False, "include_qkv_bias": False, "weight_tying": False, "attention_dropout": 0.0,
    "residual_dropout": 0.0, "embedding_dropout": 0.0, "alibi": False, "flash_attention": False, "use_cache": False,
    "torch_dtype": "float32",
}  # fmt: skip


def write_checkpoint(directory: Path, options: argparse.Namespace) -> None:
    """Random weights in LLaDA's layout, MLP three times the width; attention about as uneven as in a trained model."""
    sizes = {"d_model": options.width, "n_heads": options.heads, "n_kv_heads": options.heads}
    sizes |= {"n_layers": options.blocks, "mlp_hidden_size": 3 * options.width, "max_sequence_length": options.length}
    sizes |= {key: options.vocabulary for key in ("vocab_size", "embedding_size")}
    sizes |= {"mask_token_id": options.vocabulary - 1} | dict.fromkeys(("eos_token_id", "pad_token_id"), 0)
    named = ("rope_theta", "rms_norm_eps")
    config = StructpruneLLaDAConfig(**sizes, **{key: CONFIG[key] for key in named})
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
    """Random windows and their noisy copies, level after level."""
    generator, mask_id = torch.Generator().manual_seed(0), options.vocabulary - 1
    ids = torch.randint(mask_id, (options.windows, options.length), generator=generator)  # (N, T)
    steps = INTERVAL * options.levels
    noisy, _ = noise_windows(ids, mask_id, "levels", generator, steps, INTERVAL, False)  # (N, S, T)
    save_file({"ids": ids, "noisy": noisy.contiguous()}, path)


def run_worker(side: str, method: str, options: argparse.Namespace, folder: Path) -> dict:
    """Figures of one pruning call in a fresh process; its linears are in `folder` afterwards."""
    request = {
        "checkpoint": str(folder / "checkpoint"), "data": str(folder / "data.safetensors"), "method": method,
        "ratio": options.ratio, "steps": INTERVAL * options.levels, "interval": INTERVAL, "threads": options.threads,
        "out": str(folder / f"{method}-{side}.safetensors"),
    }  # fmt: skip
    asked = folder / "request.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    if side in ("release", ITSELF):
        command = [options.python, "-m", "scripts.bench.published_worker", options.published, asked]
    else:
        command = [sys.executable, "-m", "scripts.bench.masking_worker", asked, str(options.batch)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"{method} of {side} failed ({last}): leave it out of --methods, or see to --published, --python"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def plan_rounds(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(method, side) of every run, the sides of a method in turns; SparseGPT is short and gets two rounds more."""
    runs = []
    for method in options.methods:
        sides = ["ours"] + ["release"] * bool(options.published) + [FORWARDS] * (method == "sink-wanda")
        rounds = options.rounds + 2 * (method == "sparsegpt" and not options.quick)
        runs += [(method, side) for _ in range(rounds) for side in sides]
    return runs


def spread(values: list[float]) -> dict:
    """Median of a few figures, and their range."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def summarise(method: str, figures: dict[str, list[dict]]) -> dict:
    """Medians of every side of a method, and the ratios between them, round by round; no bytes where none are known."""
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
        row["times_faster"] = spread([a / b for a, b in zip(seconds["release"], seconds["ours"])])
    if {"ours", "release"} <= peaks.keys():
        row["memory_ratio"] = median(peaks["ours"]) / max(1, median(peaks["release"]))
    return row


def result_table(rows: list[dict], options: argparse.Namespace) -> Table:
    size = f"{options.blocks} blocks of {options.width}, {options.windows} windows of {options.length}"
    table = Table(title=f"{size}, {options.levels} levels, {options.threads} threads")
    for name in ("method", "ours s", "release s", "faster (range)", "wanted", "ours MB", "release MB", "memory"):
        table.add_column(name, justify="right")
    for name in ("over the passes", "masks differ", "in block 0", "outputs differ", "misplaced: ours", "release"):
        table.add_column(name, justify="right")
    for row in rows:
        faster, agreement, over = (row.get(key) for key in ("times_faster", "agreement", "over_forwards"))
        table.add_row(
            row["method"],
            *_by_side(row["seconds"], 1, ".2f"),
            _ranged(faster) if faster else "",
            f"{WANTED[row['method']]} x" if row["method"] in WANTED else "",
            *_by_side(row["peak_bytes"], 1e6, ".0f"),
            f"{row['memory_ratio']:.2f} x" if "memory_ratio" in row else "",
            _ranged(over) if over else "",
            *(f"{agreement[name]:.1e}" if agreement else "" for name in DIFFERENCES),
            *(f"{agreement['against_fp64'][s]['misplaced']:.1e}" if agreement else "" for s in ("ours", "release")),
        )
    table.caption = f"memory wanted: at most {WANTED_MEMORY} x; sink-Wanda over the passes: at most {WANTED_FORWARDS} x"
    itself = [row["agreement"]["release_itself"] for row in rows if "release_itself" in row.get("agreement", {})][:1]
    for found in itself:
        apart = ", ".join(f"{found[name]:.1e}" for name in DIFFERENCES)
        table.caption += f"; the release's SparseGPT on another number of threads differs from itself by {apart}"
    return table


def _by_side(figures: dict, unit: float, form: str) -> list[str]:
    return [f"{figures[side]['median'] / unit:{form}}" if side in figures else "" for side in ("ours", "release")]


def _ranged(value: dict) -> str:
    return f"{value['median']:.2f} x ({value['low']:.2f} to {value['high']:.2f})"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Checked options, `methods` as a list."""
    parser = OneLineParser(__doc__)
    parser.add_argument("--published", type=Path, help="checkout of the release (default: ours alone)")
    parser.add_argument("--release-commit", help="to record (default: that of --published where it is a git checkout)")
    parser.add_argument("--python", default=sys.executable, help="of the release's environment (default: this one)")
    parser.add_argument("--methods", default=",".join(WANTED), help=f"of {', '.join(CALLS)} (default %(default)s)")
    sizes = {"blocks": 8, "width": 512, "heads": 8, "vocabulary": 4096, "length": 512, "windows": 8, "levels": 10}
    for name, value in (sizes | {"rounds": 3, "threads": 2, "batch": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--ratio", type=float, default=0.5, help="of the weights of every linear (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is written unless --out is given")
    parser.add_argument("--out", type=result_file, help=f"default {OUT}")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    options.methods = options.methods.split(",")
    unknown = [name for name in options.methods if name not in CALLS]
    if unknown:
        raise UserError(f"--methods '{unknown[0]}' is none of {', '.join(CALLS)}")
    for name in (*sizes, "rounds", "threads", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} = {getattr(options, name)}: give at least 1")
    if options.width % (2 * options.heads):
        raise UserError(f"--width = {options.width}: each of {options.heads} heads needs an even share")
    if not 0 < options.ratio < 1:
        raise UserError(f"--ratio = {options.ratio}: give a number between 0 and 1")
    if "wanda" in options.methods and options.windows > WANDA_WINDOWS:
        raise UserError(f"--windows = {options.windows}: the release's Wanda has room for {WANDA_WINDOWS}")
    if options.published and not (options.published / "lib" / "prune_llada.py").is_file():
        raise UserError(
            f"--published {options.published}: no lib/prune_llada.py there, so not a checkout of the release"
        )
    options.out = options.out or (None if options.quick else OUT)
    return options


def measure(options: argparse.Namespace, folder: Path) -> list[dict]:
    """One row of figures for every method."""
    write_checkpoint(folder / "checkpoint", options)
    write_data(folder / "data.safetensors", options)
    figures: dict[str, dict[str, list[dict]]] = {method: {} for method in options.methods}
    with progress_bars() as track:
        for method, side in track(plan_rounds(options), "pruning"):
            name = FORWARDS if side == FORWARDS else method
            figures[method].setdefault(side, []).append(run_worker(side, name, options, folder))
    rows = [summarise(method, found) for method, found in figures.items()]
    if not options.published:
        return rows
    found = agreements(options, folder, run_worker)
    return [row | {"agreement": found[row["method"]]} for row in rows]


def identify(options: argparse.Namespace) -> dict:
    """Which release was measured: SHA-256 of its code, and its commit where that is given or known."""
    commit, command = (
        options.release_commit,
        ["git", "-C", str(options.published), "rev-parse", "-q", "--verify", "HEAD"],
    )
    if commit is None and (options.published / ".git").exists():
        with suppress(OSError):  # no git here
            commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    digest = hashlib.sha256((options.published / "lib" / "prune_llada.py").read_bytes()).hexdigest()
    return {"release_commit": commit, "release_sha256": digest}


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"bench_masking: the machine is busy (load {load:.1f}), so the times mean little", file=sys.stderr)
    kept = ("blocks", "width", "heads", "vocabulary", "length", "windows", "levels", "ratio", "rounds", "batch")
    settings = {name: getattr(options, name) for name in kept} | {"dtype": "float32", "load_before": load}
    settings |= identify(options) if options.published else {}
    with tempfile.TemporaryDirectory(prefix="bench-masking-") as folder:
        rows = measure(options, Path(folder))
    if not all("ours" in row["peak_bytes"] for row in rows):
        print("bench_masking: the peak of memory cannot be reset here, so none is given", file=sys.stderr)
    if options.out:
        write_result(options.out, {"machine": describe_machine(), "settings": settings, "rows": rows})
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(result_table(rows, options))
    if options.out:
        console.print(f"Wrote {options.out}", soft_wrap=True)
    apart = [row["method"] for row in rows if options.published and not row["agreement"]["agree"]]
    if apart:
        print(f"bench_masking: ours is farther from fp64 than rounding explains on {', '.join(apart)}", file=sys.stderr)
    return 1 if apart else 0


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_masking", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
