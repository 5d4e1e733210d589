"""Peak memory, time and disk of runs whose weights stay on disk, beside runs that hold them, at several sizes.

Checkpoints have random weights. Each run is a process of its own, on one thread.

    python -m scripts.bench.bench_offload [--sizes 0.1B,1B] [--runs structured,wanda] [--ways held,disk] [--work DIR]

Rows of other sizes, runs and ways in an earlier result are kept; each names its machine. 8B takes 50 GB of disk, and
held 40 GB of memory.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from rich.table import Table

from scripts.bench.bench_pruned import random_calibration
from scripts.tools.random_checkpoint import LLaDAShape, llada_values, write_random
from scripts.tools.script_line import (
    OneLineParser,
    one_line,
    parse_names,
    result_file,
    run_json,
    show_result,
    write_result,
)
from structprune.bench.machine import describe_machine
from structprune.config import Config, ModelSettings
from structprune.errors import UserError
from structprune.runs.ghost import read_ghost
from structprune.runs.inspect import inspect_checkpoint, inspect_masking

SHAPES = {  # width, heads, blocks, channels, vocabulary, positions
    "0.1B": LLaDAShape(768, 12, 10, 2048, 16384, 2048),
    "1B": LLaDAShape(2048, 16, 16, 5504, 50304, 2048),
    "8B": LLaDAShape(4096, 32, 32, 12288, 126464, 4096),  # LLaDA-8B
    "2 blocks of 8B": LLaDAShape(4096, 32, 2, 12288, 126464, 4096),
}
VOLUME = {"windows": 2, "held_out": 1, "window": 64, "levels": 2}
MASKS = {"method": "unstructured", "masking.ratio": 0.5, "reconstruct.enabled": False}
STRUCTURED = {
    "structured.ratio": 0.5, "structured.score": "wanda", "structured.allocation": "uniform",
    "structured.split": "equal",
}  # fmt: skip
RUNS: dict[str, dict] = {
    "structured": STRUCTURED | {"reconstruct.producers": False},
    "structured without refit": STRUCTURED | {"reconstruct.enabled": False},
    "magnitude without a check": MASKS | {"masking.score": "magnitude", "calibration.held_out": 0},
} | {
    score: MASKS | {"masking.score": score}
    for score in ("magnitude", "wanda", "sink-wanda", "sparsegpt", "sink-sparsegpt")
}  # fmt: skip
KEPT = "disk with parts"  # as the command does by default
WAYS = {"held": False, "disk": "disk", KEPT: "disk"}  # memory.offload
DEFAULT_WAYS = ("held", "disk")
PAIRS = {"disk": "held", KEPT: "disk"}  # what a way is compared with

PROGRAM = """
import json, resource, sys, time
from pathlib import Path
import torch
from structprune.bench.memory import peak_memory_bytes
from structprune.config import Config
from structprune.runs.checkpoints import mask_checkpoint, prune_checkpoint
from structprune.runs.work import NO_WORK, Work

def waiting():
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9  # for a core
    except OSError:
        return 0.0

torch.set_num_threads(1)
config, work = Config.load(overrides=json.loads(sys.argv[3])), Work(Path(sys.argv[4])) if sys.argv[4:] else NO_WORK
before, start, queued = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), waiting()
run = prune_checkpoint if config.method == "structured" else mask_checkpoint
report = run(sys.argv[1], Path(sys.argv[2]), config, work=work).result.report
seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
used = {name: getattr(after, f"ru_{name}") - getattr(before, f"ru_{name}") for name in ("utime", "stime", "inblock",
                                                                                     "oublock")}
print(json.dumps({
    "seconds": seconds, "core_seconds": used["utime"] + used["stime"], "queued_seconds": waiting() - queued,
    "peak_bytes": peak_memory_bytes()["host"], "read_bytes": used["inblock"] * 512,
    "written_bytes": used["oublock"] * 512, "phases": report["seconds"],
}))
"""


def settings_of(name: str, way: str) -> dict:
    """A run's configuration, but for its text."""
    return RUNS[name] | {"memory.offload": WAYS[way], "model.device": "cpu"}


def reads_text(values: dict) -> bool:
    """Whether anything of a run looks at text."""
    return values.get("calibration.held_out") != 0


def predicted(checkpoint: Path, values: dict) -> int:
    """Bytes at the peak, by the dry run."""
    volume = {"windows": VOLUME["windows"], "held_out": VOLUME["held_out"], "length": VOLUME["window"]}
    volume |= {"interval": 50 // VOLUME["levels"]}
    text = {f"calibration.{key}": value for key, value in volume.items()}
    config = Config.load(overrides=values | (text if reads_text(values) else {}))
    inspect = inspect_checkpoint if config.method == "structured" else inspect_masking
    return inspect(str(checkpoint), config)["memory"]["peak host"]


def make(size: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint and a calibration file, unless they are there."""
    checkpoint, text = folder / size, folder / f"{size}.safetensors"
    if not (checkpoint / "config.json").exists():
        write_random(checkpoint, llada_values(SHAPES[size], "bfloat16"))
    model = read_ghost(checkpoint, ModelSettings()).model
    random_calibration(model, argparse.Namespace(**VOLUME)).save(text)
    return checkpoint, text


def digest(out: Path) -> str:
    """Of the weights and masks of an output."""
    result = hashlib.sha256()
    for path in sorted(out.glob("m*.safetensors")):
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 24), b""):
                result.update(block)
    return result.hexdigest()[:16]


def measure(size: str, name: str, way: str, folder: Path) -> dict:
    """One run in a process of its own."""
    checkpoint, text = make(size, folder)
    values, out = settings_of(name, way), folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    source = {"calibration.source": str(text)} if reads_text(values) else {}
    command = [sys.executable, "-c", PROGRAM, checkpoint, out, json.dumps(values | source)]
    if way == KEPT:
        shutil.rmtree(folder / "parts", ignore_errors=True)
        command.append(folder / "parts")
    environment = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    row = run_json(command, f"{name} at {size}, {way}, failed", "see the message", env=environment)
    row |= {"size": size, "run": name, "way": way, "machine": describe_machine()}
    row |= {"predicted_bytes": predicted(checkpoint, values)}
    row |= {"digest": digest(out), "checkpoint_bytes": sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))}
    shutil.rmtree(out)
    return row


def compared(rows: list[dict]) -> list[dict]:
    """Of every size and run made both ways of a pair on a machine: ratios, and whether the bytes are the same."""
    by_way = {(row["size"], row["run"], row["way"]): row for row in rows}
    result = []
    for row in rows:
        against = PAIRS.get(row["way"])
        other = by_way.get((row["size"], row["run"], against))
        if other is not None and row["machine"] == other["machine"]:
            ratios = {f"{key}_ratio": row[key] / other[key] for key in ("seconds", "core_seconds", "peak_bytes")}
            names = {key: row[key] for key in ("size", "run", "way")} | {"against": against}
            result.append({**names, "same": row["digest"] == other["digest"], **ratios})
    return result


def earlier_rows(path: Path) -> list[dict]:
    """The rows of an earlier result, none where there is no file.

    Raises:
        UserError: they do not name their machine: better now than after an hour of measuring.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    if not all("machine" in row for row in rows):
        raise UserError(f"{path} has rows without a machine, of another version: give another --out")
    return rows


def table_of(rows: list[dict]) -> Table:
    """A row per run."""
    table = Table(title="weights held in memory, and left on disk")
    for name in ("size", "run", "weights", "peak, GB", "predicted", "s", "s of a core", "read, GB"):
        table.add_column(name, justify="left" if name in ("size", "run", "weights") else "right")
    for row in rows:
        sizes = (f"{row[key] / 1e9:.2f}" for key in ("peak_bytes", "predicted_bytes"))
        times = (f"{row[key]:.0f}" for key in ("seconds", "core_seconds"))
        table.add_row(row["size"], row["run"], row["way"], *sizes, *times, f"{row['read_bytes'] / 1e9:.1f}")
    return table


def run(arguments: list[str] | None) -> None:
    parser = OneLineParser(__doc__)
    parser.add_argument("--sizes", default="0.1B,1B", help="default %(default)s")
    parser.add_argument("--runs", default=",".join(RUNS), help="default %(default)s")
    parser.add_argument("--ways", default=",".join(DEFAULT_WAYS), help=f"also {KEPT!r}; default %(default)s")
    parser.add_argument("--work", type=Path, help="checkpoints lie there, and stay (default: a temporary directory)")
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/offload.json"))
    options = parser.parse_args(arguments)
    sizes = parse_names("--sizes", options.sizes, SHAPES)
    runs, ways = parse_names("--runs", options.runs, RUNS), parse_names("--ways", options.ways, WAYS)
    rows = earlier_rows(options.out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size, name, way in ((size, name, way) for size in sizes for name in runs for way in ways):
            new = measure(size, name, way, folder.absolute())
            rows = [row for row in rows if (row["size"], row["run"], row["way"]) != (size, name, way)] + [new]
            rows.sort(
                key=lambda row: ([*SHAPES].index(row["size"]), [*RUNS].index(row["run"]), [*WAYS].index(row["way"]))
            )
            result = {"volume": VOLUME, "rows": rows, "compared": compared(rows)}
            write_result(options.out, result)
    show_result(table_of(rows), out=options.out, width=120)


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_offload", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
