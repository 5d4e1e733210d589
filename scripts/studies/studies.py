"""What studies on the embedded model share: common noise, runs that resume, intervals over seeds, the command line."""

import argparse
import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from rich.console import Console
from rich.table import Table

from scripts.tools.script_line import OneLineParser, one_line, result_file, write_result
from structprune.bench.machine import describe_machine
from structprune.cli.console import progress_bars
from structprune.config import Config
from structprune.errors import UserError
from structprune.evaluation.compare import paired_difference
from structprune.models.modeling_structprune import DiffusionLM
from structprune.runs.demo import HeldOut

# 0.975 quantiles of Student's t at 1 to 30 degrees of freedom, as in any table of them; scipy is no dependency.
T_QUANTILES = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
    2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272,
)  # fmt: skip
OPTIONS = {"seeds": 3, "windows": 192, "length": 128, "jobs": os.cpu_count() or 1}


@dataclass(frozen=True)
class Study:
    """Variants run at seeds and ratios, and what is made of their losses."""

    name: str
    about: str
    """One line for --help."""
    out: str
    """Where the JSON goes unless --out says otherwise."""
    base: dict
    """Configuration keys of every variant."""
    ratios: dict | list
    """The ratios, or their configuration keys."""
    variants: dict[str, dict]
    """Name -> the configuration keys of its own."""
    measure: Callable[..., dict]
    """`measure(variant, seed, windows, length, threads)`, of a module: a row with `variant`, `seed` and `ratios`."""
    summarise: Callable[[dict, list[int]], dict]
    tables: Callable[[dict], list[Table]]
    width: int = 150
    """Columns of the printed tables."""


def held_out_text(model: DiffusionLM, seed: int, windows: int, length: int) -> HeldOut:
    """Windows and noise that all variants of a seed share."""
    return HeldOut(model, 1000 + seed, windows, length)


def run_all(
    measure: Callable[..., dict], tasks: list[tuple], settings: dict, partial: Path, jobs: int, console: Console
) -> dict[tuple[str, int], dict]:
    """Run what `partial` has not yet, in `jobs` processes, and keep every result there as it comes.

    Args:
        measure: a module's function, called as `measure(*task, threads)`; its rows have `variant` and `seed`.
        tasks: (variant, seed, ...) each.
        settings: plain data; whatever else decides the results.
    Returns:
        (variant, seed) -> row.
    Raises:
        UserError: `partial` was begun under other settings.
    """
    done = {(row["variant"], row["seed"]): row for row in resume(partial, settings)}
    left = [task for task in tasks if task[:2] not in done]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool, progress_bars(console) as track:
        running = [pool.submit(measure, *task, threads) for task in left]
        finished = as_completed(running)
        try:
            for _ in track(running, "variants x seeds"):
                row = next(finished).result()
                done[row["variant"], row["seed"]] = row
                with partial.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else a failure shows only after all the other runs
            raise
    return {task[:2]: done[task[:2]] for task in tasks}


def resume(partial: Path, settings: dict) -> list[dict]:
    """Rows of a run that was cut off, its torn last line dropped; a file without any starts with `settings`.

    Raises:
        UserError: begun under other settings, or a line in the middle is broken.
    """
    settings = json.loads(json.dumps(settings))  # as it reads back: tuples are lists
    kept = partial.read_bytes() if partial.exists() else b""
    whole = kept[: kept.rfind(b"\n") + 1]
    if not whole:
        partial.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        return []
    try:
        first, *rows = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise UserError(f"{partial} has a broken line ({error}): delete it to start anew") from error
    before = first.get("settings")
    if before is None:
        raise UserError(f"{partial} was begun by another version, without its settings: delete it to start anew")
    if before != settings:
        apart = ", ".join(differences(before, settings))
        raise UserError(f"{partial} was begun with {apart}: run with the same settings, or delete it to start anew")
    if len(whole) < len(kept):
        os.truncate(partial, len(whole))  # only now: a file that is refused stays as it was
    return rows


def differences(before: dict, now: dict) -> list[str]:
    """What differs in words, the names alone where values are long."""
    found = []
    for key in sorted(before | now):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"another {key}.{name}" for name in old | new if old.get(name) != new.get(name)][:1]
        elif old != new:
            found.append(f"{key} = {old}, not {new}")
    return found


def losses(done: dict, name: str, seeds: list[int], ratio: str) -> torch.Tensor:
    """Losses of one variant at one ratio over seeds and windows, (seeds, N) fp64."""
    return torch.tensor([done[name, seed]["ratios"][ratio]["loss"] for seed in seeds], dtype=torch.float64)


def loss_row(done: dict, name: str, seeds: list[int], ratio: str) -> dict:
    """Mean loss of one variant with its interval: see `over_seeds`."""
    return over_seeds(losses(done, name, seeds, ratio))


def contrast_row(done: dict, ours: tuple[str, str], theirs: tuple[str, str], seeds: list[int]) -> dict:
    """Paired difference of two (variant, ratio): see `over_seeds`; positive: ours loses more."""
    return over_seeds(losses(done, ours[0], seeds, ours[1]) - losses(done, theirs[0], seeds, theirs[1]))


def over_seeds(values: torch.Tensor) -> dict:
    """Mean with its 95% interval over seeds, and over windows, as plain data.

    Every seed draws calibration text, noise and evaluation text anew, but its windows share one pruned model. So the
    interval is Student's t over the means of the seeds. `windows` takes every window for a draw of its own: it is
    conditional on the calibration sets drawn, says nothing about others, and marks nothing.

    Args:
        values: (seeds, N) fp64.
    Returns:
        `seed_interval` of the means of the seeds, and `windows`: normal `standard_error`, `low` and `high`.
    """
    pooled = paired_difference(values.flatten(), torch.zeros(values.numel()))
    return seed_interval(values.mean(1).tolist()) | {"windows": {key: pooled[key] for key in pooled if key != "mean"}}


def seed_interval(by_seed: list[float]) -> dict:
    """`mean` of the means of seeds, 95% t interval `low` to `high`, and whether a difference from 0 is `shown`.

    Shown is what excludes 0 while all seeds agree in sign. A single seed has no interval: None, and nothing is shown.
    """
    count, mean = len(by_seed), math.fsum(by_seed) / len(by_seed)
    if count == 1:
        return {"mean": mean, "low": None, "high": None, "shown": False, "by_seed": by_seed}
    variance = math.fsum((value - mean) ** 2 for value in by_seed) / (count - 1)
    half = t_quantile(count - 1) * math.sqrt(variance / count)
    agree = min(by_seed) > 0 or max(by_seed) < 0
    return {
        "mean": mean, "low": mean - half, "high": mean + half, "shown": agree and abs(mean) > half, "by_seed": by_seed,
    }  # fmt: skip


def t_quantile(freedom: int) -> float:
    """0.975 quantile of Student's t; over 30 degrees of freedom that of 30, which is a little wide."""
    return T_QUANTILES[min(freedom, len(T_QUANTILES)) - 1]


def cell(row: dict | None, paired: bool = False) -> str:
    """Mean [95% interval] of a row, `*` where a paired difference is shown."""
    if row is None:
        return "-"
    text = f"{row['mean']:+.4f}"
    if row["low"] is not None:
        text += f" [{row['low']:+.4f}, {row['high']:+.4f}]"
    return text + " *" * (paired and row["shown"])


def parse_options(study: Study, arguments: list[str] | None) -> argparse.Namespace:
    """The options every study has, checked."""
    parser = OneLineParser(study.about)
    parser.add_argument("--out", type=result_file, default=Path(study.out), help="default %(default)s")
    told = {"seeds": "two at least for intervals", "windows": "held-out windows per seed", "length": "tokens in each"}
    for name, value in OPTIONS.items():
        text = told.get(name, "processes")
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default %(default)s)")
    options = parser.parse_args(arguments)
    for name in OPTIONS:
        if getattr(options, name) < 1:
            raise UserError(f"--{name} = {getattr(options, name)}: give at least 1")
    return options


def run_study(study: Study, options: argparse.Namespace) -> None:
    """Run or resume every variant at every seed, keep the JSON, print the tables."""
    seeds = list(range(options.seeds))
    options.out.parent.mkdir(parents=True, exist_ok=True)  # for what is kept while the study runs
    partial = options.out.with_suffix(".part.jsonl")
    tasks = [(name, seed, options.windows, options.length) for seed in seeds for name in study.variants]
    settings = {
        "windows": options.windows,
        "length": options.length,
        "base": study.base | {"calibration.source": "calibration.txt"},
    }
    decisive = settings | {"ratios": study.ratios, "variants": study.variants, "defaults": Config().model_dump()}
    done = run_all(study.measure, tasks, decisive, partial, options.jobs, Console(stderr=True))
    result = {"settings": {"seeds": seeds} | settings, "machine": describe_machine(), "variants": study.variants}
    result |= study.summarise(done, seeds)
    write_result(options.out, result)
    partial.unlink(missing_ok=True)
    console = Console(width=study.width)
    for table in study.tables(result):
        console.print(table)
    console.print(f"Wrote {options.out}")


def main(study: Study, arguments: list[str] | None = None) -> int:
    return one_line(study.name, lambda: run_study(study, parse_options(study, arguments)))
