"""The figures of an evaluation: values with their errors, averages over tasks, and paired comparisons."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from structprune.errors import UserError
from structprune.evaluation.compare import RESAMPLES, Bootstrap, average, conclude, paired_bootstrap, student_t
from structprune.evaluation.metrics import metric_of
from structprune.evaluation.results import Row, RunRows, item_parts, metrics_of

Bootstraps = dict[str, dict[str, Bootstrap]]  # task -> metric -> bootstrap of the difference from the baseline


def summarise(rows: RunRows, seed: int = 0, resamples: int = RESAMPLES) -> dict:
    """Every figure of an evaluation, as plain data (for results.json and the table).

    The other checkpoints are compared with the first; in metrics relative to a reference, which has none itself, with
    the first that has them. A task's main metric is the first one of its items.

    Args:
        seed: of the bootstrap.
    Returns:
        `metrics`: directions; `tasks`: task -> `main` metric and all `metrics`; `checkpoints`: checkpoint -> task ->
        items, samples and the value of each metric; `average`: checkpoint -> mean of the main metric over the tasks
        where it is a proportion (empty with fewer than two); `baseline`; `differences`: checkpoint -> task -> metric ->
        Comparison (no entry where no item is shared); `average_differences`: checkpoint -> Comparison.
    Raises:
        UserError: a task without a metric that all its checkpoints have.
    """
    labels = list(rows)
    baseline, *others = labels
    tasks = _tasks(rows)
    figures = {label: {task: describe(each) for task, each in rows[label].items()} for label in labels}
    shared = [name for name, task in tasks.items() if metric_of(task["main"]).proportion]
    averaged = shared if len(shared) > 1 else []
    bootstraps = {label: _bootstraps(rows, label, seed, resamples) for label in others}
    return {
        "metrics": {name: asdict(metric_of(name)) for task in tasks.values() for name in task["metrics"]},
        "tasks": tasks,
        "checkpoints": figures,
        "average_tasks": averaged,
        "average": {
            label: _mean([values[task]["metrics"][tasks[task]["main"]] for task in averaged])
            for label, values in figures.items()
            if averaged and all(task in values for task in averaged)
        },
        "baseline": baseline,
        "differences": {label: _conclusions(each) for label, each in bootstraps.items()},
        "average_differences": _average_differences(bootstraps, averaged, tasks),
    }


def describe(rows: Sequence[Row]) -> dict:
    """Number of items, mean samples run and allowed per item, and the estimate of every metric."""
    return {
        "items": len(rows),
        "samples": sum(row.samples for row in rows) / max(1, len(rows)),
        "full_samples": sum(row.full_samples for row in rows) / max(1, len(rows)),
        "metrics": {name: estimate(rows, name) for name in metrics_of(rows)},
    }


def estimate(rows: Sequence[Row], metric: str) -> dict[str, float | None]:
    """A metric's `value`, its standard `error` over items and its 95% interval, `low` to `high`.

    The error is that of a ratio of sums by linearisation (for a mean, the sample deviation over the root of n). The
    interval is Wilson's for proportions and Student's otherwise. With a single item there is neither (None).
    """
    parts = list(item_parts(rows, metric).values())
    count, above, below = len(parts), sum(part[0] for part in parts), sum(part[1] for part in parts)
    value = above / below
    if count < 2:
        return {"value": value, "error": None, "low": None, "high": None}
    squares = sum((part[0] - value * part[1]) ** 2 for part in parts)
    error = math.sqrt(squares / (count * (count - 1))) / (below / count)
    half = student_t(count - 1) * error
    low, high = wilson(value, count) if metric_of(metric).proportion else (value - half, value + half)
    return {"value": value, "error": error, "low": low, "high": high}


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    z = 1.959964
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _tasks(rows: RunRows) -> dict[str, dict]:
    """Task -> main metric, and all that every checkpoint has or that are relative, in order of appearance."""
    tasks: dict[str, dict] = {}
    for name in dict.fromkeys(task for values in rows.values() for task in values):
        known = [metrics_of(values[name]) for values in rows.values() if name in values]
        relative = dict.fromkeys(metric for each in known for metric in each if metric_of(metric).relative)
        common = [metric for metric in known[0] if all(metric in each for each in known)]
        metrics = [*(metric for metric in common if metric not in relative), *relative]
        if not metrics:
            raise UserError(f"task '{name}' has no metric that all checkpoints have: evaluate them on the same items")
        tasks[name] = {"main": metrics[0], "metrics": metrics}
    return tasks


def _mean(values: Sequence[dict]) -> dict[str, float | None]:
    """Mean of independent estimates: value, error, and normal 95% interval."""
    value = sum(each["value"] for each in values) / len(values)
    if any(each["error"] is None for each in values):
        return {"value": value, "error": None, "low": None, "high": None}
    error = math.sqrt(sum(each["error"] ** 2 for each in values)) / len(values)
    return {"value": value, "error": error, "low": value - 1.96 * error, "high": value + 1.96 * error}


def _bootstraps(rows: RunRows, label: str, seed: int, resamples: int) -> Bootstraps:
    """Bootstraps of a checkpoint's tasks and metrics, over the items that it and what it is compared with have."""
    bootstraps: Bootstraps = {}
    for task, ours in rows[label].items():
        for relative in (False, True):
            rival = _rival(rows, task, relative)
            if rival is not None and rival != label:
                gaps = _task_bootstraps((ours, rows[rival][task]), relative, task, seed, resamples)
                bootstraps[task] = bootstraps.get(task, {}) | gaps
    return bootstraps


def _rival(rows: RunRows, task: str, relative: bool) -> str | None:
    """What checkpoints are compared with: the first; in relative metrics, the first that has any."""
    if not relative:
        first = next(iter(rows))
        return first if task in rows[first] else None
    return next((label for label, tasks in rows.items() if _names(tasks.get(task, ()), relative=True)), None)


def _names(rows: Sequence[Row], relative: bool) -> list[str]:
    """The metrics of rows that are relative to a reference, or those that are not."""
    return [name for name in metrics_of(rows) if metric_of(name).relative == relative]


def _task_bootstraps(
    pair: tuple[Sequence[Row], Sequence[Row]], relative: bool, task: str, seed: int, resamples: int
) -> dict[str, Bootstrap]:
    """Bootstraps of the metrics that both have, over the items that both have."""
    keys = {row.key for row in pair[0]} & {row.key for row in pair[1]}
    ours, theirs = ([row for row in rows if row.key in keys] for rows in pair)
    names = [name for name in _names(ours, relative) if name in metrics_of(theirs)]
    return {
        name: paired_bootstrap(item_parts(pair[0], name), item_parts(pair[1], name), task, seed, resamples)
        for name in names
    }


def _conclusions(bootstraps: Bootstraps) -> dict[str, dict[str, dict]]:
    return {
        task: {name: asdict(conclude(each, metric_of(name).higher_is_better)) for name, each in metrics.items()}
        for task, metrics in bootstraps.items()
    }


def _average_differences(
    others: Mapping[str, Bootstraps], averaged: list[str], tasks: Mapping[str, dict]
) -> dict[str, dict[str, Any]]:
    """Checkpoint -> comparison of the average, where it shares items of all tasks with the baseline."""
    differences = {}
    for label, bootstraps in others.items():
        main = [bootstraps.get(task, {}).get(tasks[task]["main"]) for task in averaged]
        shared = [bootstrap for bootstrap in main if bootstrap is not None]
        if main and len(shared) == len(main):
            differences[label] = asdict(conclude(average(shared), higher_is_better=True))
    return differences
