"""The table of an evaluation: every checkpoint's figures, and whether they differ from the first one's."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

NO_DIFFERENCE = "no difference shown"


def eval_table(summary: dict, every_metric: bool = False) -> Table | Group:
    """Values ± standard errors; with several checkpoints also differences, their intervals and what they say.

    Args:
        summary: what `evaluation.summary.summarise` returns.
        every_metric: all metrics of a task, not the main one alone.
    """
    wanted = {task: each["metrics"] if every_metric else [each["main"]] for task, each in summary["tasks"].items()}
    return _alone(summary, wanted) if len(summary["checkpoints"]) == 1 else _compared(summary, wanted)


def _grid(title: str, *columns: str) -> Table:
    """A table that fits 80 columns where names are short; long ones are folded, figures and verdicts never."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _alone(summary: dict, wanted: dict[str, list[str]]) -> Table:
    """One checkpoint: a section per task, a row per metric."""
    ((label, tasks),) = summary["checkpoints"].items()
    table = _grid(label, "value", "95 % interval")
    for task, metrics in wanted.items():
        found = tasks[task]
        table.add_section()
        table.add_row(task, *_counts([found]), style="bold")
        for name in metrics:
            metric, shown = summary["metrics"][name], found["metrics"][name]
            table.add_row(f"  {_title(metric)}", _plus_minus(shown, metric), _interval(shown, metric))
    if label in summary["average"]:
        table.add_section()
        shown, share = summary["average"][label], {"proportion": True}
        table.add_row(f"{_average_title(summary)}, %", _plus_minus(shown, share), _interval(shown, share))
    table.caption = "± standard error over items; samples: Monte Carlo samples an answer, or noisy copies of a window"
    return table


def _compared(summary: dict, wanted: dict[str, list[str]]) -> Group:
    """Several checkpoints: a table per task and metric, a row per checkpoint."""
    baseline, parts = summary["baseline"], []
    for task, metrics in wanted.items():
        having = {label: tasks[task] for label, tasks in summary["checkpoints"].items() if task in tasks}
        items, spent = _counts(list(having.values()))
        for name in metrics:
            metric = summary["metrics"][name]
            table = _difference_grid(f"{task}: {_title(metric)} ({items}, {spent})")
            for label, found in having.items():
                difference = summary["differences"].get(label, {}).get(task, {}).get(name)
                cells = _difference(difference, metric) if label != baseline else ("", "")
                table.add_row(label, _plus_minus(found["metrics"][name], metric), *cells)
            parts.append(table)
    if summary["average"]:
        share = {"proportion": True}
        table = _difference_grid(f"{_average_title(summary)}, % ({', '.join(summary['average_tasks'])})")
        for label, shown in summary["average"].items():
            difference = summary["average_differences"].get(label)
            cells = _difference(difference, share) if label != baseline else ("", "")
            table.add_row(label, _plus_minus(shown, share), *cells)
        parts.append(table)
    caption = (
        f"difference: against {baseline}, on the same items; ± standard error over items; interval: paired bootstrap;"
        " samples: Monte Carlo samples an answer, or noisy copies of a window;"
        f" {NO_DIFFERENCE}: the interval holds 0, or too few items differ for one"
    )
    return Group(*parts, Text(caption, style="italic dim"))


def _difference_grid(title: str) -> Table:
    table = _grid(title, "value", "difference [95 %]", "")
    table.title_justify = "left"
    table.columns[-1].justify, table.columns[-1].min_width = "left", len(NO_DIFFERENCE)
    return table


def _counts(found: list[dict]) -> tuple[str, str]:
    """Items, and samples spent."""
    items, spent = _range([each["items"] for each in found]), _spent(found)
    return f"{items} item{'' if items == '1' else 's'}", f"{spent} sample{'' if spent == '1' else 's'}"


def _title(metric: dict) -> str:
    """Its name, unit and the direction of a gain."""
    unit = "%" if metric["proportion"] else "nats"
    return f"{metric['name']}, {unit} {'↑' if metric['higher_is_better'] else '↓'}"


def _average_title(summary: dict) -> str:
    return f"mean of {len(summary['average_tasks'])} tasks"


def _number(value: float, metric: dict, sign: str = "") -> str:
    """Proportions in percent, nats with four digits."""
    return f"{100 * value:{sign}.2f}" if metric["proportion"] else f"{value:{sign}.4f}"


def _plus_minus(found: dict, metric: dict) -> str:
    error = "" if found["error"] is None else f" ± {_number(found['error'], metric)}"
    return _number(found["value"], metric) + error


def _interval(found: dict, metric: dict, sign: str = "") -> str:
    if found["low"] is None:
        return ""
    return f"[{_number(found['low'], metric, sign)}, {_number(found['high'], metric, sign)}]"


def _difference(found: dict | None, metric: dict) -> tuple[str, str]:
    """Difference with its interval, and the verdict with the number of items where some are left out."""
    if found is None:
        return "", "no item in common"
    shared = f" ({found['items']} shared)" if found["left_out"] else ""
    return f"{_number(found['difference'], metric, '+')} {_interval(found, metric, '+')}", found["verdict"] + shared


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"


def _spent(found: list[dict]) -> str:
    """Samples drawn for an answer of how many allowed, as means over items and checkpoints."""
    spent = sum(each["samples"] for each in found) / len(found)
    full = sum(each["full_samples"] for each in found) / len(found)
    return f"{spent:.4g}" if spent == full else f"{spent:.4g} of {full:.4g}"
