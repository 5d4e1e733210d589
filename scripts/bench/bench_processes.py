"""What a second process saves a pruning of the embedded model, one core each, and what more would.

Runs of one and of two processes take turns. Of every phase the part that two processes share is what they save, times
two; from it the time of more processes follows (Amdahl), without what their messages take.

    python -m scripts.bench.bench_processes [--rounds 3] [--out scripts/results/processes.json]
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from rich.table import Table
from safetensors.torch import load_file

from scripts.studies.studies import usable_cores
from scripts.tools.script_line import one_line, parse_counts, show_result, write_result
from structprune.assets import model_directory, text_file
from structprune.bench.machine import describe_machine
from structprune.errors import UserError

CALIBRATION = {"windows": 64, "copies": 2, "length": 128, "held_out": 16, "batch": 10}
RUNS: dict[str, list[str]] = {
    "structured, 0.5": ["--set=structured.split_candidates=4", "--set=structured.split_windows=32"],
    "masks, 0.5": ["--method", "unstructured"],
}
COUNTS, PREDICTED = (1, 2), (4, 8)
OPTIONS = {"rounds": (3, "of one process and of two")}
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def prune(out: Path, more: list[str], count: int) -> dict[str, float]:
    """Seconds of every phase of a pruning that so many processes share.

    Raises:
        UserError: it failed.
    """
    sets = [f"--set=calibration.{key}={value}" for key, value in CALIBRATION.items()]
    arguments = [
        "-m", "structprune", "prune", str(model_directory()), "--out", str(out), "--ratio", "0.5", "--device", "cpu",
        "--calibration", str(text_file("calibration.txt")), *sets, *more,
    ]  # fmt: skip
    launcher = [*LAUNCHER, str(count)] if count > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"the pruning of {count} processes ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    return json.loads((out / "report.json").read_text(encoding="utf-8"))["seconds"]


def farthest(one: Path, two: Path) -> float:
    """The largest relative distance of a tensor in two outputs; infinity where their shapes differ."""
    first, second = (load_file(out / "model.safetensors") for out in (one, two))
    if {name: value.shape for name, value in first.items()} != {name: value.shape for name, value in second.items()}:
        return float("inf")
    gaps = [(value.double() - second[name].double()).norm() / value.double().norm() for name, value in first.items()]
    return float(max(gaps))


def shared_seconds(one: float, two: float) -> float:
    """The part of a phase that two processes share, from its seconds in one and in two: at most all of it."""
    return min(one, max(0.0, 2 * (one - two)))


def predicted(phases: dict[str, tuple[float, float]], count: int) -> float:
    """Seconds of so many processes, from each phase's seconds in one and its shared part."""
    return sum(one - shared + shared / count for one, shared in phases.values())


def measure(more: list[str], rounds: int) -> dict:
    """Seconds of every phase, count and round; ratios of medians; how far apart the outputs are."""
    times: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    gaps = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            outs = {count: Path(folder) / str(count) for count in COUNTS}
            for count, out in outs.items():
                times[count].append(prune(out, more, count))
            gaps.append(farthest(*outs.values()))
    names = [name for name in times[1][0] if name != "total"]
    medians = {
        count: {name: median(each.get(name, 0.0) for each in runs) for name in [*names, "total"]}
        for count, runs in times.items()
    }
    phases = {name: (medians[1][name], shared_seconds(medians[1][name], medians[2][name])) for name in names}
    rest = medians[1]["total"] - sum(one for one, _ in phases.values())  # outside of all phases, not shared
    phases["other"] = (rest, 0.0)
    return {
        "seconds": times, "median": medians, "shared": {name: shared for name, (_, shared) in phases.items()},
        "ratio": medians[1]["total"] / medians[2]["total"], "farthest": gaps,
        "predicted": {count: medians[1]["total"] / predicted(phases, count) for count in PREDICTED},
    }  # fmt: skip


def table_of(results: dict) -> Table:
    """A row per run."""
    table = Table(title="one process against two, a core each")
    names = ["run", "one, s", "two, s", "one / two", "shared", *(f"{count} predicted" for count in PREDICTED)]
    for name in names:
        table.add_column(name, justify="left" if name == "run" else "right")
    for name, row in results.items():
        one, two = (row["median"][count]["total"] for count in COUNTS)
        more = (f"{row['predicted'][count]:.2f}x" for count in PREDICTED)
        share = sum(row["shared"].values()) / one
        table.add_row(name, f"{one:.1f}", f"{two:.1f}", f"{row['ratio']:.2f}x", f"{100 * share:.0f} %", *more)
    return table


def run(arguments: list[str] | None) -> None:
    options = parse_counts(__doc__, OPTIONS, "scripts/results/processes.json", arguments)
    if usable_cores() < max(COUNTS):
        raise UserError(f"{usable_cores()} core is not enough for two processes of one each: allow 2")
    results = {name: measure(more, options.rounds) for name, more in RUNS.items()}
    settings = {f"calibration.{key}": value for key, value in CALIBRATION.items()} | {"rounds": options.rounds}
    write_result(options.out, {"machine": describe_machine(), "settings": settings, "runs": results})
    show_result(table_of(results), out=options.out, width=120)


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_processes", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
