"""A training of `structprune recover` on CPU: with denormal numbers computed, with them flushed to 0, and in bfloat16.

All train the same pruned embedded model on the same windows, each in a process of its own, as worker threads keep the
setting they begin with. In bfloat16 the dense model computes too. All depends on the processor: the result has a run of
each that it was made on.

    python -m scripts.bench.bench_training [--tokens N] [--out scripts/results/training_speed.json]
"""

import json
import multiprocessing
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from scripts.studies.recovery_study import TRAIN, pruned_model
from scripts.tools.script_line import one_line, parse_counts, show_result, write_result
from structprune.assets import model_directory, text_file
from structprune.bench.machine import describe_machine
from structprune.errors import UserError
from structprune.models.denormals import flushed_denormals
from structprune.recovery.settings import RecoverConfig
from structprune.runs.recover import recover

RATIO = "0.5"
OPTIONS = {"tokens": (100_000, "learnt by each"), "threads": (1, "of each")}
COMPUTED, FLUSHED, HALF = "computed", "flushed", "bfloat16"
TITLES = {COMPUTED: "float32, denormals computed", FLUSHED: "float32", HALF: HALF}
IN_HALF = {"train.precision": "bfloat16", "teacher.dtype": "bfloat16"}


def train(keys: dict, flush: bool, threads: int) -> dict:
    """Tokens learnt, the seconds of the Trainer's steps and evaluations, and the held-out divergence at the end."""
    from structprune.runs import training

    torch.set_num_threads(threads)
    training.flushed_denormals = flushed_denormals if flush else nullcontext  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        pruned = Path(pruned_model(0, RATIO).name) / "pruned"
        done = recover(str(pruned), str(model_directory()), Path(folder) / "out", RecoverConfig.load(overrides=keys))
    learnt = done.report["learnt"]
    return {"tokens": learnt["tokens"], "seconds": learnt["seconds"], "kl": done.report["after"]["kl"]}


def in_own_process(work: partial) -> dict:
    """The result of `work()` in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work)


def measure(tokens: int, threads: int) -> dict:
    """All trainings, and how much faster flushing is than computing, and bfloat16 than float32."""
    keys = TRAIN | {"data.source": str(text_file("calibration.txt")), "train.tokens": tokens, "train.evaluations": 1}
    results = {
        COMPUTED: in_own_process(partial(train, keys, False, threads)),
        FLUSHED: in_own_process(partial(train, keys, True, threads)),
        HALF: in_own_process(partial(train, keys | IN_HALF, True, threads)),
    }
    computed, flushed, half = (result["seconds"] for result in results.values())
    return results | {"ratio": computed / flushed, "bfloat16_ratio": flushed / half}


def table_of(result: dict) -> Table:
    """Speed and result of each, and the ratios."""
    gains = f"flushing denormals is {result['ratio']:.2f}x as fast, bfloat16 {result['bfloat16_ratio']:.2f}x more"
    table = Table(title=f"training on CPU: {gains}")
    for name in ("computation", "tokens / s", "held-out divergence after it"):
        table.add_column(name, justify="left" if name == "computation" else "right")
    for name, title in TITLES.items():
        row = result[name]
        table.add_row(title, f"{row['tokens'] / row['seconds']:,.0f}", f"{row['kl']:.4f}")
    return table


def earlier_runs(path: Path) -> list[dict]:
    """The runs of an earlier result, none where there is no file.

    Raises:
        UserError: the file is of another form: better now than after the trainings.
    """
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": []}
    if "runs" not in result:
        raise UserError(f"{path} has no runs, it is of another version: give another --out")
    return result["runs"]


def run(arguments: list[str] | None) -> None:
    options = parse_counts(__doc__, OPTIONS, "scripts/results/training_speed.json", arguments)
    settings, machine = {"tokens": options.tokens, "threads": options.threads, "ratio": RATIO}, describe_machine()
    earlier = earlier_runs(options.out)
    result = {"machine": machine, "settings": settings} | measure(options.tokens, options.threads)
    others = [each for each in earlier if each["machine"]["processor"] != machine["processor"]]
    write_result(options.out, {"runs": [*others, result]})
    show_result(table_of(result), out=options.out, width=100)


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_training", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
