"""What keeping finished parts costs a run, and what they save the next one, on the embedded model.

Runs without a journal, with an empty one, and with the one of a finished run take turns.

    python -m scripts.bench.bench_work [--rounds 3] [--out scripts/results/work_cost.json]
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.table import Table

from scripts.tools.script_line import one_line, parse_counts, show_result, write_result
from structprune.assets import model_directory, text_file
from structprune.bench.machine import describe_machine
from structprune.config import Config
from structprune.models.journal import NOWHERE, Journal
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.runs.mask import mask
from structprune.runs.pruner import Pruner

CALIBRATION = {"windows": 64, "copies": 2, "length": 128, "held_out": 16, "batch": 10}
BASE = {f"calibration.{key}": value for key, value in CALIBRATION.items()}
RUNS: dict[str, dict] = {
    "structured, 0.5": {"structured.split_candidates": 4, "structured.split_windows": 32},
    "masks, 0.5": {"method": "unstructured"},
}
WAYS = ("without", "keeping", "kept before")
OPTIONS = {"rounds": (3, "of each way")}


def seconds(model: DiffusionLM, keys: dict, journal: Journal) -> float:
    """Of one run, calibration included."""
    config = Config.load(overrides=BASE | {"calibration.source": str(text_file("calibration.txt"))} | keys)
    start = time.perf_counter()
    if config.method == "structured":
        pruner = Pruner(model, config)
        pruner.keep_in(journal)
        pruner.prune()
    else:
        mask(model, config, journal=journal)
    return time.perf_counter() - start


def measure(keys: dict, rounds: int) -> dict:
    """Seconds of every way and round, the bytes kept, and ratios of medians to the run without a journal."""
    model = load_model(model_directory(), device="cpu")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            journals = (NOWHERE, Journal(Path(folder)), Journal(Path(folder)))
            for way, journal in zip(WAYS, journals):
                times[way].append(seconds(model, keys, journal))
            kept = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    medians = {way: median(values) for way, values in times.items()}
    return {"seconds": times, "bytes": kept, "ratio": {way: medians[way] / medians[WAYS[0]] for way in WAYS[1:]}}


def table_of(results: dict) -> Table:
    """A row per run."""
    table = Table(title="finished parts: what keeping them costs, and what they save")
    for name in ("run", *(f"{way}, s" for way in WAYS), "keeping / without", "kept before / without", "kept, MB"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for name, row in results.items():
        times = (f"{median(row['seconds'][way]):.1f}" for way in WAYS)
        ratios = (f"{row['ratio'][way]:.2f}x" for way in WAYS[1:])
        table.add_row(name, *times, *ratios, f"{row['bytes'] / 1e6:.1f}")
    return table


def run(arguments: list[str] | None) -> None:
    options = parse_counts(__doc__, OPTIONS, "scripts/results/work_cost.json", arguments)
    results = {name: measure(keys, options.rounds) for name, keys in RUNS.items()}
    settings = BASE | {"rounds": options.rounds}
    write_result(options.out, {"machine": describe_machine(), "settings": settings, "runs": results})
    show_result(table_of(results), out=options.out, width=120)


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_work", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
