"""The demo: prune the small trained model of the package at several ratios, and compare methods on held-out text."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from structprune.assets import NAME, demo_settings, model_directory, text_file
from structprune.bench.latency import Latency, Timing, measure_latency, speedup
from structprune.bench.machine import describe_machine
from structprune.bench.memory import peak_memory_bytes
from structprune.calibration.build import calibrate
from structprune.calibration.noise import stratified_noise
from structprune.calibration.windows import cut_windows
from structprune.checkpoint.output import check_output, output_draft
from structprune.config import Config
from structprune.evaluation.compare import paired_difference
from structprune.evaluation.nelbo import Nelbo, masked_nelbo
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.tokenizer import load_tokenizer
from structprune.progress import Track, untracked
from structprune.recovery.settings import RecoverConfig
from structprune.recovery.trainer import require_training
from structprune.report.demo_tables import OURS, RECOVERED
from structprune.report.plots import check_matplotlib, plot_loss
from structprune.runs.evaluate import Session
from structprune.runs.pruned import Pruned
from structprune.runs.pruner import Pruner
from structprune.runs.recover import recover

Saved = dict[tuple[str, float], Pruned]  # by method and ratio

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SAVED = (0.3, 0.5)
WINDOWS, LENGTH = 128, 128  # windows of held-out text, and tokens in each (as in calibration)
OUTPUT_BYTES = 100_000_000  # of the saved models, at most
SETTINGS = yaml.safe_load(demo_settings().read_text(encoding="utf-8"))
BASE = SETTINGS["base"] | {"calibration.source": str(text_file("calibration.txt"))}
METHODS = {OURS: {}} | SETTINGS["methods"]
RECOVER = SETTINGS["recover"] | {"data.source": str(text_file("calibration.txt")), "model.device": "cpu"}
RECOVERED_AT, RECOVERED_FOLDER = 0.5, "structprune-0.5-recovered"


@dataclass(frozen=True)
class Demo:
    """What the demo measured, as plain data: a row per method and ratio, and the dense model; and what it wrote."""

    rows: list[dict]
    dense: dict
    paths: list[Path]


class HeldOut:
    """Windows of the package's held-out text under fixed noise, so that differences between models are paired.

    Args:
        model: the dense one.
        seed: of windows and noise.
    """

    def __init__(self, model: DiffusionLM, seed: int, windows: int, length: int):
        text = text_file("heldout.txt").read_text(encoding="utf-8")
        ids = torch.tensor(load_tokenizer(model_directory())(text, verbose=False)["input_ids"])  # (M,)
        generator = torch.Generator().manual_seed(seed)
        self.ids = cut_windows(ids, windows, length, generator)  # (N, T)
        self.noise = stratified_noise(self.ids, model.config.mask_token_id, generator)
        self.dense = self.nelbo(model)

    def nelbo(self, model: DiffusionLM) -> Nelbo:
        return masked_nelbo(model, self.ids, *self.noise, batch=32)

    def loss(self, model: DiffusionLM) -> list[float]:
        """Loss of NELBO against the dense model per window, nats per token."""
        return (self.nelbo(model).nelbo - self.dense.nelbo).tolist()


def run_demo(out: Path, overwrite: bool = False, track: Track = untracked, recovers: bool = False) -> Demo:
    """Prune the embedded model at `RATIOS` by every method, save it at `SAVED`, and plot the loss by ratio.

    Args:
        out: directory for the models, demo.json and nelbo.png; it appears complete or not at all.
        recovers: also train ours at `RECOVERED_AT` back.
    Raises:
        UserError: an output that cannot be written, or a library is missing.
    """
    check_matplotlib()
    if recovers:
        require_training()
    check_output(out, None, overwrite, OUTPUT_BYTES)
    start = time.perf_counter()
    model = load_model(model_directory(), device="cpu")
    held_out = HeldOut(model, 1, WINDOWS, LENGTH)
    rows, saved = _prune_all(model, held_out, track)
    models = {"dense": model} | {f"{method} {ratio}": pruned.model for (method, ratio), pruned in saved.items()}
    latency = measure_latency(models, LENGTH, 16, Timing(rounds=7))
    dense = {
        "nelbo": held_out.dense.mean,
        "standard_error": held_out.dense.standard_error,
        "latency_ms": latency["dense"].median_ms,
        "parameters": model.num_parameters(),
        "macs": rows[0]["macs_before"],
        "bytes": (model_directory() / "model.safetensors").stat().st_size,
        "windows": WINDOWS,
        "length": LENGTH,
    }
    with output_draft(out, overwrite) as draft:
        _save_models(saved, rows, latency, draft)
        if recovers:
            rows.append(_recover(rows, held_out, draft, track))
        _plot(rows, draft)
        run = {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory_bytes()}
        result = {"dense": dense, "rows": rows, "run": run, "machine": describe_machine()}
        (draft / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    paths = [out / _folder(*key) for key in saved if key[0] == OURS]
    paths += [out / RECOVERED_FOLDER] * recovers
    return Demo(rows, dense, [*paths, out / "nelbo.png", out / "demo.json"])


def _folder(method: str, ratio: float) -> str:
    return f"{method.lower()}-{ratio}"


def _prune_all(model: DiffusionLM, held_out: HeldOut, track: Track) -> tuple[list[dict], Saved]:
    """One row per method and ratio, and the models to save."""
    calibration = calibrate(model, Config.load(overrides=BASE))
    pruners = {
        method: Pruner(model, Config.load(overrides=BASE | keys), calibration, track)
        for method, keys in METHODS.items()
    }
    rows: list[dict] = []
    saved: Saved = {}
    for method, ratio in track([(method, ratio) for method in METHODS for ratio in RATIOS], "demo"):
        pruned = pruners[method].prune(ratio)
        rows.append(_row(method, ratio, pruned, held_out))
        if ratio in SAVED:
            saved[method, ratio] = pruned
    return rows, saved


def _row(method: str, ratio: float, pruned: Pruned, held_out: HeldOut) -> dict:
    report, nelbo = pruned.report, held_out.nelbo(pruned.model)
    return {
        "method": method,
        "ratio": ratio,
        "ratio_met": report["ratio"],
        "nelbo": nelbo.mean,
        "standard_error": nelbo.standard_error,
        "loss": paired_difference(nelbo.nelbo, held_out.dense.nelbo),
        "parameters": report["parameters"]["after"],
        "macs": report["macs"]["after"],
        "macs_before": report["macs"]["before"],
        "attention_steps": sum(report["choice"]["attention"]),
        "seconds": report["seconds"]["total"],
    }


def _save_models(saved: Saved, rows: list[dict], latency: dict[str, Latency], draft: Path) -> None:
    """Write the models into `draft`, and add latency and size on disk to their rows."""
    by_key = {(row["method"], row["ratio"]): row for row in rows}
    for (method, ratio), pruned in saved.items():
        pruned.report["source"] = NAME
        directory = pruned.save(draft / _folder(method, ratio))
        own = latency[f"{method} {ratio}"]
        by_key[method, ratio] |= {
            "latency_ms": own.median_ms,
            "speedup": speedup(latency["dense"], own),
            "bytes": (directory / "model.safetensors").stat().st_size,
        }


def _recover(rows: list[dict], held_out: HeldOut, draft: Path, track: Track) -> dict:
    """Train ours at `RECOVERED_AT` back on the calibration text, and save it; its row, which is as fast as before."""
    config = RecoverConfig.load(overrides=RECOVER)
    before = next(row for row in rows if (row["method"], row["ratio"]) == (OURS, RECOVERED_AT))
    place, student = draft / RECOVERED_FOLDER, draft / _folder(OURS, RECOVERED_AT)
    recovered = recover(str(student), str(model_directory()), place, config, session=Session(track))
    nelbo = held_out.nelbo(load_model(place, device="cpu"))
    return before | {
        "method": RECOVERED,
        "nelbo": nelbo.mean,
        "standard_error": nelbo.standard_error,
        "loss": paired_difference(nelbo.nelbo, held_out.dense.nelbo),
        "tokens": recovered.report["tokens"],
        "seconds": recovered.report["seconds"],
    }


def _plot(rows: list[dict], draft: Path) -> None:
    series = {
        method: [
            (row["ratio_met"], row["loss"]["mean"], row["loss"]["standard_error"])
            for row in rows
            if row["method"] == method
        ]
        for method in (*METHODS, RECOVERED)
    }
    series = {method: points for method, points in series.items() if points}
    title = "embedded model (4.8 M parameters), held-out text"
    plot_loss(series, draft / "nelbo.png", title)
