"""The embedded default: prune a small, really trained model, measure it on held-out text, and compare."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from structprune.assets import NAME, model_directory, text_file
from structprune.bench.latency import measure_latency, speedup
from structprune.bench.machine import describe_machine
from structprune.bench.memory import peak_memory_bytes
from structprune.calibration.build import calibrate
from structprune.calibration.noise import stratified_noise
from structprune.calibration.windows import cut_windows
from structprune.checkpoint.atomic import whole_directory
from structprune.config import Config
from structprune.evaluation.compare import paired_difference
from structprune.evaluation.nelbo import Nelbo, masked_nelbo
from structprune.models.loading import load_model, load_tokenizer
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track
from structprune.report.plots import plot_nelbo
from structprune.runs.prune import Pruned, Pruner

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SAVED = (0.3, 0.5)
OURS = "structprune"
WINDOWS, LENGTH = 128, 128  # held-out text: windows and tokens in each
BASE = {
    "calibration.source": str(text_file("calibration.txt")),
    "calibration.length": LENGTH,
    "calibration.windows": 32,
    "calibration.held_out": 8,
    "calibration.interval": 10,
    "calibration.batch": 4,
    "structured.split_windows": 12,
    "structured.split_candidates": 6,
}
METHODS = {
    OURS: {},
    "FLAP": {
        "structured.score": "fluctuation",
        "structured.arm": "masked",
        "structured.split": "joint",
        "reconstruct.mode": "bias",
        "reconstruct.target": "layer",
        "reconstruct.relative": False,
    },
    "magnitude": {
        "structured.score": "magnitude",
        "structured.allocation": "uniform",
        "structured.split": "equal",
        "structured.round_to": 8,  # one width for all blocks meets the ratio as closely as the others do
        "reconstruct.enabled": False,
    },
}


@dataclass(frozen=True)
class Demo:
    """What the demo measured: one row per method and ratio (plain data), and what it wrote."""

    rows: list[dict]
    dense: dict
    made: list[Path]


class _HeldOut:
    """Common noise on held-out text, so that every difference is paired."""

    def __init__(self, model: DiffusionLM):
        tokenizer = load_tokenizer(model_directory())
        text = text_file("heldout.txt").read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])  # (M,)
        generator = torch.Generator().manual_seed(1)
        self.ids = cut_windows(ids, WINDOWS, LENGTH, generator)  # (N, T)
        self.noise = stratified_noise(self.ids, model.config.mask_token_id, generator)

    def nelbo(self, model: DiffusionLM) -> Nelbo:
        return masked_nelbo(model, self.ids, *self.noise, batch=32)


def run_demo(out: Path, track: Track) -> Demo:
    """Prune the embedded model at `RATIOS` by every method, save it at `SAVED`, and draw NELBO against ratio.

    Args:
        out: directory for the models, demo.json and nelbo.png; it appears complete or not at all.
    Raises:
        UserError: an output that cannot be written.
    """
    start = time.perf_counter()
    model = load_model(model_directory(), device="cpu")
    held_out = _HeldOut(model)
    dense = held_out.nelbo(model)
    rows, kept = _prune_all(model, held_out, dense, track)
    timed = {"dense": model} | {f"{name} {ratio}": pruned.model for (name, ratio), pruned in kept.items()}
    latency = measure_latency(timed, LENGTH, batch=16, rounds=7)
    whole = {
        "nelbo": dense.mean,
        "standard_error": dense.standard_error,
        "latency_ms": latency["dense"].median_ms,
        "parameters": model.num_parameters(),
        "macs": rows[0]["macs_before"],
        "bytes": (model_directory() / "model.safetensors").stat().st_size,
        "windows": WINDOWS,
        "length": LENGTH,
    }
    with whole_directory(out) as draft:
        for pruned in kept.values():
            pruned.report["source"] = NAME
        made = {place: pruned.save(draft / _folder(*place)) for place, pruned in kept.items()}
        for row in rows:
            if place := made.get((row["method"], row["ratio"])):
                measured = latency[f"{row['method']} {row['ratio']}"]
                row |= {"latency_ms": measured.median_ms, "speedup": speedup(latency["dense"], measured)}
                row["bytes"] = (place / "model.safetensors").stat().st_size
        points = {
            name: [(r["ratio_met"], r["nelbo"], r["standard_error"]) for r in rows if r["method"] == name]
            for name in METHODS
        }
        title = "embedded model (4.8 M parameters), held-out text"
        plot_nelbo(points, (dense.mean, dense.standard_error), draft / "nelbo.png", title)
        run = {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory_bytes()}
        result = {"dense": whole, "rows": rows, "run": run, "machine": describe_machine()}
        (draft / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    paths = [out / _folder(*place) for place in kept if place[0] == OURS]
    return Demo(rows, whole, [*paths, out / "nelbo.png", out / "demo.json"])


def _folder(method: str, ratio: float) -> str:
    return f"{method.lower()}-{ratio}"


def _prune_all(model: DiffusionLM, held_out: "_HeldOut", dense: Nelbo, track: Track):
    """One row per method and ratio, and what is to be saved: ((rows), {(method, ratio): Pruned})."""
    calibration = calibrate(model, Config.load(overrides=BASE))
    pruners = {
        name: Pruner(model, Config.load(overrides=BASE | extra), calibration, track) for name, extra in METHODS.items()
    }
    rows, kept = [], {}
    for name, ratio in track([(name, ratio) for name in METHODS for ratio in RATIOS], "demo"):
        pruned = pruners[name].prune(ratio)
        rows.append(_row(name, ratio, pruned, held_out.nelbo(pruned.model), dense))
        if ratio in SAVED:
            kept[name, ratio] = pruned
    return rows, kept


def _row(name: str, ratio: float, pruned: Pruned, nelbo: Nelbo, dense: Nelbo) -> dict:
    report = pruned.report
    return {
        "method": name,
        "ratio": ratio,
        "ratio_met": report["ratio"],
        "nelbo": nelbo.mean,
        "standard_error": nelbo.standard_error,
        "loss": paired_difference(nelbo.nelbo, dense.nelbo),
        "parameters": report["parameters"]["after"],
        "macs": report["macs"]["after"],
        "macs_before": report["macs"]["before"],
        "attention_steps": sum(report["choice"]["attention"]),
        "seconds": report["seconds"]["total"],
    }


def demo_table(rows: list[dict], dense: dict) -> Table:
    """Dense against every method at the saved ratios; fits 80 columns."""
    table = Table(
        title="a small trained LLaDA, pruned: held-out text, common noise",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    columns = ("ratio", "method", "params", "MACs", "disk", "NELBO", "loss", "forward", "speed")
    units = ("", "", "M", "M", "MB", "nats/token", "against dense", "ms", "")
    for name, unit in zip(columns, units):
        width = max(len(name), len(unit), 11 if name in ("method", "NELBO") else 14 if name == "loss" else 5)
        justify = "left" if name == "method" else "right"
        table.add_column(f"{name}\n[dim]{unit}[/dim]", justify=justify, no_wrap=True, min_width=width)
    table.add_row("0", "dense", *_cells(dense), end_section=True)
    for ratio in SAVED:
        for row in (row for row in rows if row["ratio"] == ratio):
            style = "bold" if row["method"] == OURS else None
            last = row["method"] == list(METHODS)[-1]
            table.add_row(f"{ratio}", row["method"], *_cells(row), style=style, end_section=last)
    table.caption = (
        f"NELBO ± standard error over {dense['windows']} windows of {dense['length']} tokens, loss paired;"
        f" forward: 16 windows, median"
    )
    return table


def _cells(row: dict) -> list[str]:
    loss, speed = row.get("loss"), row.get("speedup", {"median": 1.0})
    return [
        f"{row['parameters'] / 1e6:.2f}",
        f"{row['macs'] / 1e6:.0f}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['nelbo']:.2f} ± {row['standard_error']:.2f}",
        f"{loss['mean']:+.3f} ± {loss['standard_error']:.3f}" if loss else "",
        f"{row['latency_ms']:.0f}",
        f"{speed['median']:.2f}x",
    ]
