"""The embedded default: prune a small, really trained model, measure it on held-out text, and compare."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from structprune.assets import model_directory, text_file
from structprune.bench.latency import measure_latency, speedup
from structprune.bench.memory import peak_memory_bytes
from structprune.calibration.noise import stratified_noise
from structprune.calibration.windows import cut_windows
from structprune.config import Config
from structprune.evaluation.compare import paired_difference
from structprune.evaluation.nelbo import Nelbo, masked_nelbo
from structprune.models.loading import load_model, load_tokenizer
from structprune.models.modeling_structprune import DiffusionLM
from structprune.pipeline import Pruned, Pruner, calibrate
from structprune.report.plots import plot_nelbo
from structprune.report.tables import change, gigabytes, millions
from structprune.statistics.rows import Track

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SAVED = (0.3, 0.5)
OURS = "structprune"
WINDOWS, LENGTH = 192, 128  # held-out text: windows and tokens in each
BASE = {
    "calibration.source": str(text_file("calibration.txt")),
    "calibration.length": LENGTH,
    "calibration.windows": 48,
    "calibration.held_out": 8,
    "calibration.interval": 10,
    "calibration.batch": 4,
    "structured.split_windows": 48,
    "structured.split_candidates": 6,
}
METHODS = {
    OURS: {},
    "FLAP": {
        "structured.score": "fluctuation",
        "structured.split": "joint",
        "reconstruct.mode": "bias",
        "reconstruct.target": "layer",
        "reconstruct.relative": False,
    },
    "magnitude": {
        "structured.score": "magnitude",
        "structured.allocation": "uniform",
        "structured.split": "equal",
        "reconstruct.enabled": False,
    },
}


@dataclass(frozen=True)
class Demo:
    """What the demo measured: one row per method and ratio (plain data), the directories and the picture it made."""

    rows: list[dict]
    dense: dict
    made: list[Path]
    table: Table


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


def run_demo(out: Path, overwrite: bool, track: Track) -> Demo:
    """Prune the embedded model at `RATIOS` by every method, save ours at `SAVED`, and draw NELBO against ratio.

    Args:
        out: directory for the models, demo.json and nelbo.png.
    Raises:
        UserError: an output that exists, or cannot be written.
    """
    model = load_model(model_directory(), device="cpu")
    held_out = _HeldOut(model)
    dense = held_out.nelbo(model)
    kept: dict[tuple[str, float], Pruned] = {}
    rows = []
    calibration = calibrate(model, Config.load(overrides=BASE))
    pruners = {
        name: Pruner(model, Config.load(overrides=BASE | extra), calibration, track) for name, extra in METHODS.items()
    }
    steps = [(name, ratio) for name in METHODS for ratio in RATIOS]
    for name, ratio in track(steps, "demo"):
        pruned = pruners[name].prune(ratio)
        rows.append(_row(name, ratio, pruned, held_out.nelbo(pruned.model), dense))
        if ratio in SAVED:
            kept[name, ratio] = pruned
    timed = {"dense": model} | {f"{name} {ratio}": pruned.model for (name, ratio), pruned in kept.items()}
    latency = measure_latency(timed, LENGTH, batch=16, rounds=9)
    for row in rows:
        measured = latency.get(f"{row['method']} {row['ratio']}")
        if measured:
            row |= {"latency_ms": measured.median_ms, "speedup": speedup(latency["dense"], measured)}
    made = [pruned.save(out / f"llada-docs-{ratio}", overwrite) for (n, ratio), pruned in kept.items() if n == OURS]
    for row, path in zip((r for r in rows if r["method"] == OURS and r["ratio"] in SAVED), made):
        row["bytes"] = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    whole = {
        "nelbo": dense.mean,
        "standard_error": dense.standard_error,
        "latency_ms": latency["dense"].median_ms,
        "parameters": model.num_parameters(),
        "macs": rows[0]["macs_before"],
        "bytes": (model_directory() / "model.safetensors").stat().st_size,
        "windows": WINDOWS,
        "length": LENGTH,
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    points = {
        name: [(r["ratio_met"], r["nelbo"], r["standard_error"]) for r in rows if r["method"] == name] for name in METHODS
    }
    title = "embedded model (4.8 M parameters), held-out text"
    made.append(plot_nelbo(points, (dense.mean, dense.standard_error), out / "nelbo.png", title))
    return Demo(rows, whole, made, demo_table(rows, whole))


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
    """Dense against every method at the saved ratios."""
    table = Table(title="structprune demo: a small trained LLaDA, pruned; held-out text, common noise")
    for name in ("model", "parameters", "MACs", "on disk", "NELBO ± s.e.", "loss ± s.e.", "forward", "speed-up"):
        table.add_column(name, justify="left" if name == "model" else "right")
    score = f"{dense['nelbo']:.3f} ± {dense['standard_error']:.3f}"
    cells = [millions(dense["parameters"]), millions(dense["macs"]), gigabytes(dense["bytes"]), score, ""]
    table.add_row("dense", *cells, f"{dense['latency_ms']:.1f} ms", "1.00 x", end_section=True)
    for ratio in SAVED:
        for row in (row for row in rows if row["ratio"] == ratio):
            loss = f"{row['loss']['mean']:+.3f} ± {row['loss']['standard_error']:.3f}"
            table.add_row(
                f"{row['method']} {ratio}",
                f"{millions(row['parameters'])} ({change(dense['parameters'], row['parameters'])})",
                millions(row["macs"]),
                gigabytes(row["bytes"]) if "bytes" in row else "not saved",
                f"{row['nelbo']:.3f} ± {row['standard_error']:.3f}",
                loss,
                f"{row['latency_ms']:.1f} ms",
                f"{row['speedup']['median']:.2f} x",
                style="bold" if row["method"] == OURS else None,
                end_section=row["method"] == list(METHODS)[-1],
            )
    table.caption = f"NELBO in nats per token over {dense['windows']} windows of {dense['length']}; 16 windows a forward pass"
    return table
