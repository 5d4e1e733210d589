"""A search for widths against its dry run: operations, memory and disk as `structprune inspect` predicts them.

Operations become seconds by the rate of a matrix product that is timed in the same run, on the same threads.

    python -m scripts.bench.bench_search [--checkpoint DIR --text FILE] [--out scripts/results/search_cost.json]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rich.table import Table

from scripts.bench.measure_inspect import PROGRAM
from scripts.studies.factor_study import MIXED
from scripts.studies.search_study import KNAPSACK, STREAMED
from scripts.tools.script_line import OneLineParser, one_line, result_file, show_result, write_result
from structprune.assets import model_directory, text_file
from structprune.bench.machine import describe_machine
from structprune.errors import UserError

KEYS = STREAMED | MIXED | KNAPSACK | {"structured.arm": "masked", "structured.split": "joint"}
SIZE = 1024  # of the square matrices that the rate is measured with


def matmul_rate(repeats: int = 30) -> float:
    """fp32 operations per second of a matrix product on this machine, median over some."""
    left, right = torch.randn(2, SIZE, SIZE)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * SIZE**3 / median(seconds)


def structprune(*arguments: str) -> tuple[str, int]:
    """Output and peak resident bytes of one command in its own process.

    Raises:
        UserError: the command failed; its last line says why.
    """
    command = [sys.executable, "-c", PROGRAM, *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    lines = process.stderr.strip().splitlines()
    if process.returncode:
        raise UserError(f"structprune {arguments[0]} failed: {lines[-2] if len(lines) > 1 else process.stderr}")
    return process.stdout, int(lines[-1].split()[0])  # before the seconds


def measure(checkpoint: Path, options: list[str], folder: Path) -> dict:
    """What the dry run predicts of a run, and what the run takes."""
    rate = matmul_rate()
    predicted = json.loads(structprune("inspect", str(checkpoint), "--json", *options)[0])
    levels, out = folder / "levels", folder / "out"
    start = time.perf_counter()
    _, peak = structprune("prune", str(checkpoint), "--out", str(out), "--levels", str(levels), *options)
    total = time.perf_counter() - start
    seconds = json.loads((out / "report.json").read_text(encoding="utf-8"))["seconds"]
    # levels are a part of the search; the rest of it measures losses
    measured = {
        "levels": seconds["levels"],
        "search": seconds["search"] - seconds["levels"],
        "refit": seconds["refit"],
    }
    parts = {
        name: {"operations": operations, "predicted": operations / rate, "measured": measured[name]}
        for name, operations in predicted["search"]["operations"].items()
    }
    disk = sum(path.stat().st_size for path in levels.rglob("*") if path.is_file())
    return {
        "rate": rate,
        "seconds": parts,
        "run_seconds": total,
        "disk": {"predicted": predicted["search"]["disk"], "measured": disk},
        "peak_bytes": {"predicted": predicted["memory"]["peak host"], "measured": peak},
    }


def table_of(result: dict) -> Table:
    """Predicted against measured, with their ratio."""
    table = Table(title=f"A search: predicted and measured, at {result['rate'] / 1e9:.0f} GFLOP/s")
    for name in ("part", "predicted", "measured", "measured / predicted"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, row in result["seconds"].items():
        table.add_row(name, *(f"{row[side]:.0f} s" for side in ("predicted", "measured")), ratio(row))
    for name, key in (("levels on disk", "disk"), ("peak memory", "peak_bytes")):
        row = result[key]
        table.add_row(name, *(f"{row[side] / 1e6:.0f} MB" for side in ("predicted", "measured")), ratio(row))
    return table


def ratio(row: dict) -> str:
    """Measured over predicted."""
    return f"{row['measured'] / row['predicted']:.2f}x"


def run(arguments: list[str] | None) -> None:
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=model_directory(), help="default: the embedded model")
    parser.add_argument("--name", default="embedded model", help="of the checkpoint in tables (default %(default)s)")
    parser.add_argument("--text", type=Path, default=text_file("calibration.txt"), help="calibration text")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/search_cost.json"))
    given = parser.parse_args(arguments)
    keys = KEYS | {"calibration.length": 128, "calibration.interval": 10, "calibration.source": str(given.text)}
    options = ["--ratio", str(given.ratio), *(f"--set={key}={value}" for key, value in keys.items())]
    options += [f"--set={each}" for each in given.set]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given.checkpoint, options, Path(folder))
    settings = keys | {"calibration.source": given.text.name, "structured.ratio": given.ratio}
    facts = {"name": given.name, "settings": settings, "set": given.set, "machine": describe_machine()}
    write_result(given.out, facts | result)
    show_result(table_of(result), out=given.out)


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_search", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
