"""The tables of an evaluation: figures of every checkpoint, and whether they differ from the first one's."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from structprune.report.tables import grid

NO_DIFFERENCE = "no difference shown"
SAMPLES = "samples: Monte Carlo samples per answer, or noisy copies of a window"
PERCENT = {"unit": "%"}  # the metric of an average


def eval_table(summary: dict, every_metric: bool = False) -> Table | Group:
    """Values ± standard errors; with several checkpoints also differences, their intervals and verdicts.

    Args:
        summary: what `evaluation.summary.summarise` returns.
        every_metric: all metrics of a task, not only the main one.
    """
    metrics = {task: each["metrics"] if every_metric else [each["main"]] for task, each in summary["tasks"].items()}
    return _alone(summary, metrics) if len(summary["checkpoints"]) == 1 else _compared(summary, metrics)


def _alone(summary: dict, metrics: dict[str, list[str]]) -> Table:
    """One checkpoint: a section per task, a row per metric."""
    ((label, tasks),) = summary["checkpoints"].items()
    table = grid(label, "", "value", "95 % interval")
    for task, names in metrics.items():
        table.add_section()
        table.add_row(task, *_counts([tasks[task]]), style="bold")
        for name in names:
            metric, value = summary["metrics"][name], tasks[task]["metrics"][name]
            table.add_row(f"  {_title(metric)}", _plus_minus(value, metric), _interval(value, metric))
    if value := summary["average"].get(label):
        table.add_section()
        table.add_row(_average_title(summary), _plus_minus(value, PERCENT), _interval(value, PERCENT))
    table.caption = f"± standard error over items; {SAMPLES}"
    return table


def _compared(summary: dict, metrics: dict[str, list[str]]) -> Group:
    """Several checkpoints: a table per task and metric, a row per checkpoint."""
    baseline, differences = summary["baseline"], summary["differences"]
    tables = []
    for task, names in metrics.items():
        results = {label: tasks[task] for label, tasks in summary["checkpoints"].items() if task in tasks}
        items, samples = _counts(list(results.values()))
        for name in names:
            metric = summary["metrics"][name]
            values = {label: each["metrics"][name] for label, each in results.items() if name in each["metrics"]}
            gaps = {label: differences.get(label, {}).get(task, {}).get(name) for label in values}
            title = f"{task}: {_title(metric, baseline)} ({items}, {samples})"
            rival = next(iter(values)) if metric["relative"] else baseline  # a reference has no value of its own
            tables.append(_difference_table(title, values, gaps, rival, metric))
    if summary["average"]:
        title = f"{_average_title(summary)} ({', '.join(summary['average_tasks'])})"
        tables.append(_difference_table(title, summary["average"], summary["average_differences"], baseline, PERCENT))
    caption = (
        f"difference: against {baseline}, on the same items; ± standard error over items; interval: paired bootstrap;"
        f" {SAMPLES}; {NO_DIFFERENCE}: the interval contains 0, or too few items differ for one"
    )
    if any(each["relative"] for each in summary["metrics"].values()):
        caption += f"; where {baseline} is the reference: difference against the first checkpoint below it"
    return Group(*tables, Text(caption, style="italic dim"))


def _difference_table(title: str, values: dict, differences: dict, baseline: str, metric: dict) -> Table:
    """A row per checkpoint: its value, and its difference to the baseline's.

    Args:
        values, differences: label -> value with its error, and difference with its interval.
    """
    table = grid(title, "", "value", "difference [95 %]", "")
    table.title_justify = "left"
    table.columns[-1].justify, table.columns[-1].min_width = "left", len(NO_DIFFERENCE)
    for label, value in values.items():
        cells = _difference(differences.get(label), metric) if label != baseline else ("", "")
        table.add_row(label, _plus_minus(value, metric), *cells)
    return table


def _counts(results: list[dict]) -> tuple[str, str]:
    """Number of items, and of samples drawn."""
    counts, samples = sorted({each["items"] for each in results}), _samples(results)
    items = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    return f"{items} item{'' if items == '1' else 's'}", f"{samples} sample{'' if samples == '1' else 's'}"


def _title(metric: dict, baseline: str = "") -> str:
    """Name, unit and direction of improvement, and the reference where it is relative to one."""
    reference = f" (reference: {baseline})" if metric["relative"] and baseline else ""
    return f"{metric['name']}{reference}, {metric['unit']} {'↑' if metric['higher_is_better'] else '↓'}"


def _average_title(summary: dict) -> str:
    return f"mean of {len(summary['average_tasks'])} tasks, %"


def _number(value: float, metric: dict, sign: str = "") -> str:
    """Shares in percent, nats with four digits."""
    return f"{100 * value:{sign}.2f}" if metric["unit"] == "%" else f"{value:{sign}.4f}"


def _plus_minus(value: dict, metric: dict) -> str:
    error = "" if value["error"] is None else f" ± {_number(value['error'], metric)}"
    return _number(value["value"], metric) + error


def _interval(value: dict, metric: dict, sign: str = "") -> str:
    if value["low"] is None:
        return ""
    return f"[{_number(value['low'], metric, sign)}, {_number(value['high'], metric, sign)}]"


def _difference(gap: dict | None, metric: dict) -> tuple[str, str]:
    """Difference with its interval, and the verdict with the number of shared items if some are not shared."""
    if gap is None:
        return "", "no item in common"
    shared = f" ({gap['items']} shared)" if gap["left_out"] else ""
    return f"{_number(gap['difference'], metric, '+')} {_interval(gap, metric, '+')}", gap["verdict"] + shared


def _samples(results: list[dict]) -> str:
    """Samples drawn per answer, and how many were allowed if that is more: means over items and checkpoints."""
    mean = sum(each["samples"] for each in results) / len(results)
    limit = sum(each["full_samples"] for each in results) / len(results)
    return f"{mean:.4g}" if mean == limit else f"{mean:.4g} of {limit:.4g}"
