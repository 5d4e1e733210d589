"""How soon a rehearsal tells what a run's stages need: seconds until it is over, and of which the rehearsal itself.

Checkpoints have random weights, which stay on disk. Each run is a process of its own, and ends where the long work
would begin.

    python -m scripts.bench.bench_rehearsal [--size 1B] [--runs structured,wanda] [--threads 1] [--work DIR]
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from rich.table import Table

from scripts.bench.bench_offload import RUNS, SHAPES, VOLUME, make, reads_text
from scripts.tools.script_line import (
    OneLineParser,
    check_counts,
    one_line,
    parse_names,
    result_file,
    run_json,
    show_result,
    write_result,
)
from structprune.bench.machine import describe_machine

REHEARSED = {name: values for name, values in RUNS.items() if reads_text(values)}  # the others have nothing to
PROGRAM = """
import json, resource, sys, time
from pathlib import Path
import torch
from structprune.config import Config
from structprune.runs.checkpoints import mask_checkpoint, prune_checkpoint

spans = []

def clock():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime

def track(items, title):
    if spans:  # the long work begins
        raise SystemExit(0)
    before = clock()
    yield from items
    if title == "rehearsal":
        after, names = clock(), ("seconds", "core_seconds")
        spans.append({"until_over": dict(zip(names, [b - a for a, b in zip(start, after)])),
                      "rehearsal": dict(zip(names, [b - a for a, b in zip(before, after)]))})
        print(json.dumps(spans[0]))

torch.set_num_threads(int(sys.argv[4]))
config = Config.load(overrides=json.loads(sys.argv[3]) | {"memory.rehearsal": True})
start = clock()
run = prune_checkpoint if config.method == "structured" else mask_checkpoint
run(sys.argv[1], Path(sys.argv[2]), config, track=track)
"""


def measure(name: str, size: str, folder: Path, threads: int) -> dict:
    """One run up to the end of its rehearsal, in a process of its own."""
    checkpoint, text = make(size, folder)
    values = REHEARSED[name] | {"memory.offload": "disk", "model.device": "cpu", "calibration.source": str(text)}
    command = [sys.executable, "-c", PROGRAM, checkpoint, folder / "out", json.dumps(values), str(threads)]
    environment = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": str(threads)}
    row = run_json(command, f"{name} at {size} failed", "see the message", env=environment)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return {"run": name} | row


def table_of(rows: list[dict], size: str) -> Table:
    """A row per run."""
    table = Table(title=f"rehearsals at {size}")
    for name in ("run", "until over, s", "s of a core", "rehearsal, s", "s of a core"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        spans = (row["until_over"], row["rehearsal"])
        table.add_row(row["run"], *(f"{each[key]:.0f}" for each in spans for key in ("seconds", "core_seconds")))
    return table


def run(arguments: list[str] | None) -> None:
    machine = describe_machine()
    parser, cores = OneLineParser(__doc__), machine["cores"]
    parser.add_argument("--size", default="1B", choices=[*SHAPES], help="default %(default)s")
    parser.add_argument("--runs", default=",".join(REHEARSED), help="default %(default)s")
    parser.add_argument("--threads", type=int, default=cores, help="of a run (default: a thread for each core)")
    parser.add_argument("--work", type=Path, help="checkpoints lie there, and stay (default: a temporary directory)")
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/rehearsal.json"))
    options = parser.parse_args(arguments)
    check_counts(options, ["threads"])
    size, names = options.size, parse_names("--runs", options.runs, REHEARSED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        rows = [measure(name, size, folder, options.threads) for name in names]
    machine["threads"] = options.threads
    write_result(options.out, {"size": size, "volume": VOLUME, "machine": machine, "rows": rows})
    show_result(table_of(rows, size), out=options.out, width=120)


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_rehearsal", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
