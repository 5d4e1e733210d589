"""What studies over seeds share: common noise, resumed runs, intervals, the command line.

Intervals need scipy, which is in the extra `test`.
"""

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from scripts.tools.script_line import OneLineParser, check_counts, one_line, result_file, show_result, write_result
from structprune.assets import text_file
from structprune.bench.machine import describe_machine
from structprune.cli.console import progress_bars
from structprune.config import Config
from structprune.errors import UserError
from structprune.evaluation.compare import paired_difference
from structprune.models.modeling_structprune import DiffusionLM
from structprune.runs.demo import HeldOut


def usable_cores() -> int:
    """Cores that this process may run on; `taskset` makes them fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


OPTIONS = {  # name -> (default, help)
    "seeds": (3, "at least two for intervals"),
    "windows": (192, "held-out windows per seed"),
    "length": (128, "tokens in each window"),
    "jobs": (usable_cores(), "processes"),
}
# every window at all noise levels: policies compare these, and an arm without noise sees as many windows as the others
CALIBRATION = {
    "calibration.source": str(text_file("calibration.txt")),
    "calibration.length": 128,
    "calibration.windows": 32,
    "calibration.held_out": 8,
    "calibration.interval": 10,
    "calibration.batch": 4,
}
CONSUMERS = {"reconstruct.producers": False, "reconstruct.stream": 0}  # variants say what else is refitted


@dataclass(frozen=True)
class Study:
    """Variants run at several seeds and ratios, and the summary of their losses."""

    name: str
    about: str
    """One line for --help."""
    out: str
    """Default of --out."""
    base: dict
    """Configuration keys of all variants."""
    ratios: dict | list
    """The ratios, or their configuration keys."""
    variants: dict[str, dict]
    """Name -> configuration keys of this variant."""
    measure: Callable[..., dict]
    """`measure(variant, seed, *given, threads)`: a row with `variant`, `seed` and `ratios`; see `run_study`."""
    summarise: Callable[[dict, list[int]], dict]
    tables: Callable[[dict], list[Table]]
    width: int = 150
    """Columns of the printed tables."""


def held_out_text(model: DiffusionLM, seed: int, windows: int, length: int) -> HeldOut:
    """Windows and noise that all variants of a seed share."""
    return HeldOut(model, 1000 + seed, windows, length)


def run_all(
    measure: Callable[..., dict],
    tasks: list[tuple],
    settings: dict,
    partial: Path,
    jobs: int,
    console: Console | None = None,
) -> dict[tuple[str, int], dict]:
    """Run the tasks that `partial` does not have yet in `jobs` processes, and append every result to it.

    Args:
        measure: a function of a module, called as `measure(*task, threads)`; its rows have `variant` and `seed`.
        tasks: (variant, seed, ...) each.
        settings: plain data, everything else that decides the results.
    Returns:
        (variant, seed) -> row.
    Raises:
        UserError: `partial` was begun with other settings.
    """
    rows = {(row["variant"], row["seed"]): row for row in resume(partial, settings)}
    missing = [task for task in tasks if task[:2] not in rows]
    threads = max(1, usable_cores() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool, progress_bars(console) as track:
        futures = [pool.submit(measure, *task, threads) for task in missing]
        finished = as_completed(futures)
        try:
            for _ in track(futures, "variants x seeds"):
                row = next(finished).result()
                rows[row["variant"], row["seed"]] = row
                with partial.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else a failure shows only after all other runs
            raise
    return {task[:2]: rows[task[:2]] for task in tasks}


def resume(partial: Path, settings: dict) -> list[dict]:
    """Rows of an interrupted run, without an incomplete last line; a new file is begun with `settings`.

    Raises:
        UserError: as `checked_rows`.
    """
    content = partial.read_bytes() if partial.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        partial.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        return []
    rows = checked_rows(partial, whole, settings)
    if len(whole) < len(content):
        os.truncate(partial, len(whole))  # only now, so that a refused file stays as it was
    return rows


def checked_rows(partial: Path, whole: bytes, settings: dict) -> list[dict]:
    """The rows in the whole lines of partial results.

    Raises:
        UserError: they were begun with other settings, or a line in the middle is broken.
    """
    settings = json.loads(json.dumps(settings))  # as JSON reads it: tuples are lists
    try:
        first, *rows = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise UserError(f"{partial} has a broken line ({error}): delete it to start anew") from error
    before = first.get("settings")
    if before is None:
        raise UserError(f"{partial} was begun by another version, without its settings: delete it to start anew")
    if before != settings:
        difference = ", ".join(differences(before, settings))
        raise UserError(
            f"{partial} was begun with {difference}: run with the same settings, or delete it to start anew"
        )
    return rows


def differences(before: dict, now: dict) -> list[str]:
    """The differences of two settings in words; for nested values only their names."""
    texts = []
    for key in sorted(before | now):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            texts += [f"another {key}.{name}" for name in old | new if old.get(name) != new.get(name)][:1]
        elif old != new:
            texts.append(f"{key} = {old}, not {new}")
    return texts


def losses(rows: dict, name: str, seeds: list[int], ratio: str) -> torch.Tensor:
    """Losses of one variant at one ratio over seeds and windows, (seeds, N) fp64."""
    return torch.tensor([rows[name, seed]["ratios"][ratio]["loss"] for seed in seeds], dtype=torch.float64)


def loss_row(rows: dict, name: str, seeds: list[int], ratio: str) -> dict:
    """Mean loss of one variant with its interval: see `over_seeds`."""
    return over_seeds(losses(rows, name, seeds, ratio))


def contrast_row(rows: dict, ours: tuple[str, str], theirs: tuple[str, str], seeds: list[int]) -> dict:
    """Paired difference of two (variant, ratio): see `over_seeds`; positive: ours loses more."""
    return over_seeds(losses(rows, ours[0], seeds, ours[1]) - losses(rows, theirs[0], seeds, theirs[1]))


def over_seeds(values: torch.Tensor) -> dict:
    """Mean with its 95% interval over seeds, and over windows, as plain data.

    Every seed has its own calibration text, noise and evaluation text, but its windows share one pruned model. So the
    interval is Student's t over the means of the seeds. `windows` treats every window as an independent draw: it is
    conditional on the calibration sets drawn, says nothing about others, and decides nothing.

    Args:
        values: (seeds, N) fp64.
    Returns:
        `seed_interval` of the means of the seeds, and `windows`: normal `standard_error`, `low` and `high`.
    """
    pooled = paired_difference(values.flatten(), torch.zeros(values.numel()))
    return seed_interval(values.mean(1).tolist()) | {"windows": {key: pooled[key] for key in pooled if key != "mean"}}


def seed_interval(by_seed: list[float]) -> dict:
    """`mean` of the means of seeds, 95% t interval `low` to `high`, and whether a difference from 0 is `shown`.

    A difference is shown if the interval excludes 0 and all seeds agree in sign. A single seed has no interval (None)
    and shows nothing.
    """
    from scipy.stats import t as student_t

    count, mean = len(by_seed), math.fsum(by_seed) / len(by_seed)
    if count == 1:
        return {"mean": mean, "low": None, "high": None, "shown": False, "by_seed": by_seed}
    variance = math.fsum((value - mean) ** 2 for value in by_seed) / (count - 1)
    half = float(student_t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
    agree = min(by_seed) > 0 or max(by_seed) < 0
    return {
        "mean": mean, "low": mean - half, "high": mean + half, "shown": agree and abs(mean) > half, "by_seed": by_seed,
    }  # fmt: skip


def cell(row: dict | None, paired: bool = False) -> str:
    """Mean [95% interval] of a row, and `*` if a paired difference is shown."""
    if row is None:
        return "-"
    text = f"{row['mean']:+.4f}"
    if row["low"] is not None:
        text += f" [{row['low']:+.4f}, {row['high']:+.4f}]"
    return text + " *" * (paired and row["shown"])


def study_parser(study: Study) -> OneLineParser:
    """The parser of the options that every study has."""
    parser = OneLineParser(study.about)
    parser.add_argument("--out", type=result_file, default=Path(study.out), help="default %(default)s")
    for name, (value, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default %(default)s)")
    text = "run nothing: write what the seeds show that all variants have finished; the study can go on afterwards"
    parser.add_argument("--summary", action="store_true", help=text)
    return parser


def parse_options(parser: OneLineParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options of a study, with the counts of every study checked."""
    options = parser.parse_args(arguments)
    check_counts(options, OPTIONS)
    return options


def run_study(study: Study, options: argparse.Namespace, given: tuple = (), facts: dict | None = None) -> None:
    """Run or resume every variant at every seed, write the JSON, print the tables.

    Args:
        given: arguments of `measure` after the seed; default the windows and their length.
        facts: further settings that decide the results, plain data.
    Raises:
        UserError: partial results of other settings, or with --summary no seed that all variants have finished.
    """
    seeds = list(range(options.seeds))
    options.out.parent.mkdir(parents=True, exist_ok=True)  # for the partial results
    partial = options.out.with_suffix(".part.jsonl")
    settings = {
        "windows": options.windows,
        "length": options.length,
        "base": study.base | {"calibration.source": "calibration.txt"},
    } | (facts or {})
    decisive = settings | {"ratios": study.ratios, "variants": study.variants, "defaults": Config().model_dump()}
    if options.summary:
        rows, seeds = finished(partial, decisive, list(study.variants), seeds)
    else:
        given = given or (options.windows, options.length)
        tasks = [(name, seed, *given) for seed in seeds for name in study.variants]
        rows = run_all(study.measure, tasks, decisive, partial, options.jobs)
    result = {"settings": {"seeds": seeds} | settings, "machine": describe_machine(), "variants": study.variants}
    result |= study.summarise(rows, seeds)
    write_result(options.out, result)
    if not options.summary:
        partial.unlink(missing_ok=True)
    show_result(*study.tables(result), out=options.out, width=study.width)


def finished(partial: Path, settings: dict, variants: list[str], seeds: list[int]) -> tuple[dict, list[int]]:
    """Rows of an interrupted or running study, (variant, seed) -> row, and those of `seeds` that all variants have.

    Raises:
        UserError: there are none, or the study was begun with other settings.
    """
    content = partial.read_bytes() if partial.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]  # a line that is being written stays
    if not whole:
        raise UserError(f"no interrupted study at '{partial}': leave out --summary to run it")
    rows = {(row["variant"], row["seed"]): row for row in checked_rows(partial, whole, settings)}
    complete = [seed for seed in seeds if all((name, seed) in rows for name in variants)]
    if not complete:
        missing = next(name for name in variants if (name, seeds[0]) not in rows)
        raise UserError(f"{partial} has no seed of all variants yet ('{missing}' is missing): go on without --summary")
    return rows, complete


def main(study: Study, arguments: list[str] | None = None) -> int:
    return one_line(study.name, lambda: run_study(study, parse_options(study_parser(study), arguments)))
