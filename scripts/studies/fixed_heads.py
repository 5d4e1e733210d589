"""Studies whose variants begin with the same number of heads gone, so that the measured split decides nothing.

A study is then a table of variants, of comparisons, and of heads by ratio.
"""

from functools import partial

import torch
from rich.table import Table

from scripts.studies.studies import CALIBRATION, CONSUMERS, Study, cell, held_out_text
from scripts.studies.summaries import rows_and_gaps
from structprune.assets import model_directory
from structprune.config import Config
from structprune.models.loading import load_model
from structprune.runs.demo import HeldOut
from structprune.runs.pruned import Pruned
from structprune.runs.pruner import Pruner

Variants = dict[str, dict]  # name -> configuration keys
Contrasts = list[tuple[str, str]]  # (ours, theirs): positive, ours loses more
Heads = dict[str, int]  # ratio -> attention steps gone

# about what the measured split takes (see quality.json)
HEADS = {"0.3": 2, "0.5": 14, "0.7": 22}
BASE = CALIBRATION | CONSUMERS | {"structured.arm": "masked"}


def heads_study(names: tuple[str, str, str], variants: Variants, contrasts: Contrasts, heads: Heads = HEADS) -> Study:
    """A study of the embedded model.

    Args:
        names: the script's, what it is about, and the default of --out.
    """
    measuring = partial(measure, (variants, heads))
    summing = partial(summarise, variants, contrasts, heads)
    return Study(*names, BASE, list(heads), variants, measuring, summing, tables)


def rows_of(windows: int, copies: int) -> dict:
    """Keys of a calibration of so many windows and copies of each: 40 held-out sequences, 20 sequences in a pass."""
    sizes = {"windows": windows, "copies": copies, "held_out": 40 // copies, "batch": 20 // copies}
    return {f"calibration.{name}": size for name, size in sizes.items()}


def measure(
    plan: tuple[Variants, Heads], name: str, seed: int, windows: int, length: int, threads: int
) -> dict:  # fmt: skip
    """One variant at one seed: for each ratio the loss per held-out window, and what the run chose and took."""
    torch.set_num_threads(threads)
    variants, heads = plan
    model, results = load_model(model_directory(), device="cpu"), {}
    held_out = held_out_text(model, seed, windows, length)
    for ratio, count in heads.items():
        keys = {"calibration.seed": seed, "structured.ratio": float(ratio), "structured.split": count}
        pruned = Pruner(model, Config.load(overrides=BASE | keys | variants[name])).prune()
        report = pruned.report
        results[ratio] = loss_and_time(held_out, pruned) | {
            "refit": report["held_out_nelbo"]["kept"],
            "kept": (report["search"] or {"kept": None})["kept"],
            "heads": sum(report["choice"]["attention"]),
        }
    return {"variant": name, "seed": seed, "dense_nelbo": held_out.dense.mean, "ratios": results}


def loss_and_time(held_out: HeldOut, pruned: Pruned) -> dict:
    """The loss per held-out window, and the seconds of the run and of its search."""
    seconds = pruned.report["seconds"]
    return {
        "loss": held_out.loss(pruned.model),
        "seconds": seconds["total"],
        "search_seconds": seconds.get("search", 0.0),
    }


def summarise(variants: Variants, contrasts: Contrasts, heads: Heads, runs: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, as plain data."""
    return rows_and_gaps(variants, contrasts, heads, runs, seeds) | {"heads": heads}


def tables(result: dict) -> list[Table]:
    """Losses, and paired differences: a row per variant, a column per ratio."""
    results, ratios = [], list(dict.fromkeys(row["ratio"] for row in result["losses"]))
    for key, title in (("losses", "loss of NELBO against dense, nats per token"), ("contrasts", "paired difference")):
        table = Table(title=f"{title} [95% interval over seeds]; * excludes 0, all seeds agree")
        table.add_column("variant")
        for ratio in ratios:
            table.add_column(ratio, justify="right")
        by_name: dict[str, list[str]] = {}
        for row in result[key]:
            name = f"{row['variant']} - {row['against']}" if "against" in row else row["variant"]
            by_name.setdefault(name, []).append(cell(row, "against" in row))
        for name, cells in by_name.items():
            table.add_row(name, *cells)
        results.append(table)
    return results
