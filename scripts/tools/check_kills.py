"""A training that is killed at several moments and goes on, against one that nobody disturbed: are the bytes the same?

`structprune recover` trains the pruned embedded model in processes of its own, block by block first. Each is killed
with SIGKILL at one of evenly spaced moments, and the same command is given again.

    python -m scripts.tools.check_kills [--kills 10] [--out scripts/results/kills.json]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from scripts.studies.recovery_study import TRAIN, pruned_model
from scripts.tools.script_line import OneLineParser, check_counts, one_line, result_file, show_result, write_result
from structprune.assets import model_directory, text_file
from structprune.bench.machine import describe_machine
from structprune.errors import UserError
from structprune.recovery.folder import BLOCKS, training_folder

RATIO, KEYS = "0.5", TRAIN | {"blocks.tokens": 16_384, "train.tokens": 65_536, "train.evaluations": 8}
TIMED = ("report.json", "README.md")  # files with seconds
OPTIONS = {"kills": (10, "moments, evenly spaced over the undisturbed run")}


def command(pruned: Path, out: Path) -> list[str]:
    """The training as a user gives it."""
    keys = [f"--set={key}={value}" for key, value in KEYS.items()]
    places = ["--teacher", str(model_directory()), "--out", str(out), "--data", str(text_file("calibration.txt"))]
    return [sys.executable, "-m", "structprune", "recover", str(pruned), *places, *keys]


def run(line: list[str]) -> float:
    """Seconds of a command.

    Raises:
        UserError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.run(line, capture_output=True, text=True)
    if process.returncode:
        raise UserError(f"structprune recover failed: {process.stderr.strip().splitlines()[-1]}")
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


def kept_in(folder: Path) -> str:
    """What a training had kept when it was killed."""
    steps = [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")]
    blocks = len(list((folder / BLOCKS).glob("block-*")))
    return f"step {max(steps)}" if steps else f"{blocks} block{'s' * (blocks != 1)}" if blocks else "nothing"


def contents(out: Path) -> dict[str, bytes]:
    """File -> its bytes, for everything but what tells seconds."""
    paths = (
        path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in ("report.json", "README.md")
    )
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def figures(out: Path) -> dict:
    """What the report says of the training, without its seconds."""
    last = json.loads((out / "report.json").read_text(encoding="utf-8"))["recoveries"][-1]
    return {name: last[name] for name in ("before", "after", "history", "kept", "tokens")}


def compare(pruned: Path, folder: Path, kills: int) -> dict:
    """An undisturbed run, and every killed one against it."""
    whole = folder / "undisturbed"
    undisturbed, rows = run(command(pruned, whole)), []
    for number in range(kills):
        out, moment = folder / f"killed-{number}", undisturbed * (number + 1) / (kills + 1)
        disturbed = killed(command(pruned, out), moment)
        row: dict = {"moment": moment, "killed": disturbed, "kept": kept_in(training_folder(out))}
        row["again"] = run(command(pruned, out)) if disturbed else 0.0
        row |= {"same_bytes": contents(out) == contents(whole), "same_figures": figures(out) == figures(whole)}
        rows.append(row | {"lost": moment + row["again"] - undisturbed if disturbed else 0.0})
    return {"undisturbed": undisturbed, "rows": rows}


def table_of(result: dict) -> Table:
    """A row per kill."""
    table = Table(title=f"killed and gone on, against {result['undisturbed']:.0f} s undisturbed")
    for name in ("killed after", "kept then", "again", "lost", "same bytes", "same figures"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        same = ("yes" if row[name] else "no" for name in ("same_bytes", "same_figures"))
        times = (f"{row[name]:.0f} s" for name in ("again", "lost"))
        table.add_row(f"{row['moment']:.0f} s" if row["killed"] else "it was done", row["kept"], *times, *same)
    return table


def check(arguments: list[str] | None) -> None:
    parser = OneLineParser(__doc__.splitlines()[0])
    for name, (value, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default %(default)s)")
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/kills.json"))
    options = parser.parse_args(arguments)
    check_counts(options, OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(pruned_model(0, RATIO).name) / "pruned", Path(folder), options.kills)
    write_result(options.out, {"machine": describe_machine(), "settings": KEYS} | result)
    show_result(table_of(result), out=options.out, width=100)
    if not all(row["same_bytes"] and row["same_figures"] for row in result["rows"]):
        raise UserError("a training that went on is not the undisturbed one: see the table")


def main(arguments: list[str] | None = None) -> int:
    return one_line("check_kills", lambda: check(arguments))


if __name__ == "__main__":
    sys.exit(main())
