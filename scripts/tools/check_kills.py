"""Commands that are killed at several moments and go on, against undisturbed ones: are the bytes the same?

Structured prunings, a search, masks and a training of the embedded model, in processes of their own. Each is killed
with SIGKILL at a random moment of its undisturbed time, and the same command is given again. Commands that --commands
leaves out keep what an earlier result has of them.

    python -m scripts.tools.check_kills [--kills 20] [--commands NAME,...] [--out scripts/results/kills.json]
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from scripts.studies.recovery_study import TRAIN, pruned_model
from scripts.tools.script_line import (
    OneLineParser,
    check_counts,
    one_line,
    parse_names,
    result_file,
    show_result,
    write_result,
)
from structprune.assets import model_directory, text_file
from structprune.bench.machine import describe_machine
from structprune.errors import UserError
from structprune.recovery.folder import BLOCKS, training_folder
from structprune.runs.work import work_beside

RATIO, TEXT = "0.5", text_file("calibration.txt")
TIMED = ("report.json", "README.md")  # files with seconds
SEED = 0  # of the moments
CALIBRATION = {"windows": 16, "copies": 2, "length": 64, "held_out": 8, "batch": 8}
PRUNING = {f"calibration.{key}": value for key, value in CALIBRATION.items()}
SPLIT = {"structured.split_candidates": 2, "structured.split_windows": 8}
REVERSE = {"structured.arm": "masked+sink", "sink.trajectory": "reverse"}
SEARCH = {"search.enabled": True, "search.levels": 3, "search.rounds": 1, "search.generations": 2}
RECOVERY = TRAIN | {"blocks.tokens": 4_096, "train.tokens": 16_384, "train.evaluations": 8}
COMMANDS: dict[str, tuple[list[str], dict]] = {  # name -> options of `structprune prune`, and keys
    "structured": (["--ratio", RATIO], PRUNING | SPLIT | {"reconstruct.head": True}),
    "wanda along reverse trajectories": (["--ratio", RATIO, "--score", "wanda"], PRUNING | SPLIT | REVERSE),
    "search": (["--ratio", RATIO], PRUNING | SPLIT | SEARCH | {"search.offspring": 4, "search.sequences": 8}),
    "masks": (["--method", "unstructured"], PRUNING),
    "wanda masks from disk": (
        ["--method", "unstructured", "--score", "wanda", "--no-refit"],
        PRUNING | {"memory.offload": "disk"},
    ),
    "2:4 masks, refit": (["--method", "nm", "--score", "wanda"], PRUNING | {"reconstruct.enabled": True}),
}
TRAINING = "recover"
NAMES = (*COMMANDS, TRAINING)


def command(name: str, pruned: Path, out: Path) -> list[str]:
    """A command as a user gives it.

    Args:
        pruned: the model that a training starts from.
    """
    if name == TRAINING:
        given = ["recover", str(pruned), "--teacher", str(model_directory()), "--data", str(TEXT)]
        keys = RECOVERY
    else:
        options, keys = COMMANDS[name]
        given = ["prune", str(model_directory()), "--calibration", str(TEXT), *options]
    sets = [f"--set={key}={value}" for key, value in keys.items()]
    return [sys.executable, "-m", "structprune", *given, "--out", str(out), *sets]


def run(line: list[str]) -> float:
    """Seconds of a command.

    Raises:
        UserError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.run(line, capture_output=True, text=True)
    if process.returncode:
        raise UserError(f"structprune {line[3]} failed: {process.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - start


def killed(line: list[str], seconds: float) -> bool:
    """Kill a command after so many seconds; whether it was still running."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def kept_of(out: Path) -> str:
    """What a command had kept of an output when it was killed."""
    folder = training_folder(out)
    steps = [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")]
    if steps:
        return f"step {max(steps)}"
    blocks = len(list((folder / BLOCKS).glob("block-*")))
    parts = len(list(work_beside(out).rglob("*.safetensors")))
    count, word = (blocks, "block") if blocks else (parts, "part")
    return f"{count} {word}{'s' * (count != 1)}" if count else "nothing"


def contents(out: Path) -> dict[str, bytes]:
    """File -> its bytes, for everything but what tells seconds."""
    paths = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in TIMED)
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def figures(out: Path) -> dict:
    """What the report says, without its seconds and memory."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    if report.get("recoveries"):
        last = report["recoveries"][-1]
        return {name: last[name] for name in ("before", "after", "history", "kept", "tokens")}
    return {name: value for name, value in report.items() if name not in ("seconds", "peak_memory_bytes")}


def compare(name: str, pruned: Path, folder: Path, kills: int) -> dict:
    """An undisturbed run of a command, and every killed one against it."""
    whole = folder / "undisturbed" / "out"
    undisturbed, rows, draw = run(command(name, pruned, whole)), [], random.Random(SEED)
    for number, moment in enumerate(sorted(draw.uniform(0, undisturbed) for _ in range(kills))):
        out = folder / f"killed-{number}" / "out"
        line = command(name, pruned, out)
        disturbed = killed(line, moment)
        row: dict = {"moment": moment, "killed": disturbed, "kept": kept_of(out)}
        row["again"] = run(line) if disturbed and not out.exists() else 0.0
        row |= {"same_bytes": contents(out) == contents(whole), "same_figures": figures(out) == figures(whole)}
        rows.append(row | {"lost": moment + row["again"] - undisturbed if disturbed else 0.0})
    return {"undisturbed": undisturbed, "rows": rows}


def table_of(name: str, result: dict) -> Table:
    """A row per kill of one command."""
    table = Table(title=f"{name}: killed and gone on, against {result['undisturbed']:.0f} s undisturbed")
    for title in ("killed after", "kept then", "again", "lost", "same bytes", "same figures"):
        table.add_column(title, justify="right")
    for row in result["rows"]:
        same = ("yes" if row[key] else "no" for key in ("same_bytes", "same_figures"))
        times = (f"{row[key]:.0f} s" for key in ("again", "lost"))
        table.add_row(f"{row['moment']:.0f} s" if row["killed"] else "it was done", row["kept"], *times, *same)
    return table


def settings_of(name: str) -> dict:
    """What a command is given, as plain data."""
    options, keys = COMMANDS.get(name, ([], RECOVERY))
    return {"options": options, "keys": keys, "seed": SEED}


def earlier_results(path: Path) -> dict[str, dict]:
    """Results of commands in an earlier file that are given the same now.

    Raises:
        UserError: the file is of another form: better now than after an hour of kills.
    """
    results = json.loads(path.read_text(encoding="utf-8")).get("commands") if path.is_file() else {}
    if results is None or not all({"machine", "settings"} <= result.keys() for result in results.values()):
        raise UserError(f"{path} has no commands with a machine, it is of another version: give another --out")
    plain = {name: json.loads(json.dumps(settings_of(name))) for name in NAMES}
    return {name: result for name, result in results.items() if result["settings"] == plain.get(name)}


def check(arguments: list[str] | None) -> None:
    parser = OneLineParser(__doc__)
    parser.add_counts({"kills": 20})
    parser.add_argument("--commands", default=",".join(NAMES), help="default: all")
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/kills.json"))
    options = parser.parse_args(arguments)
    check_counts(options, ("kills",))
    results, names = earlier_results(options.out), parse_names("--commands", options.commands, NAMES)
    pruned = Path(pruned_model(0, RATIO).name) / "pruned"
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            result = compare(name, pruned, Path(folder), options.kills)
        results[name] = result | {"settings": settings_of(name), "machine": describe_machine()}
        results = {known: results[known] for known in NAMES if known in results}
        write_result(options.out, {"commands": results})
    show_result(*(table_of(name, results[name]) for name in names), out=options.out, width=100)
    rows = [row for name in names for row in results[name]["rows"]]
    if not all(row["same_bytes"] and row["same_figures"] for row in rows):
        raise UserError("what went on is not what an undisturbed command makes: see the tables")


def main(arguments: list[str] | None = None) -> int:
    return one_line("check_kills", lambda: check(arguments))


if __name__ == "__main__":
    sys.exit(main())
