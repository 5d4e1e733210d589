"""The table of an evaluation, as it is printed."""

import io
from dataclasses import asdict

import pytest
from rich.console import Console
from rich.table import Table

from structprune.evaluation.metrics import METRICS as KNOWN
from structprune.report.eval_tables import eval_table

METRICS = {name: asdict(KNOWN[name]) for name in ("acc", "acc_norm", "nelbo")}


def value(number, error=0.01):
    return {"value": number, "error": error, "low": number - 0.02, "high": number + 0.02}


def difference(number, low, high, verdict, left_out=0):
    return {"difference": number, "low": low, "high": high, "items": 90, "left_out": left_out, "verdict": verdict}


def made(labels, proportions=2):
    tasks = {f"choices{index}": {"main": "acc", "metrics": ["acc", "acc_norm"]} for index in range(proportions)}
    tasks["notes"] = {"main": "nelbo", "metrics": ["nelbo"]}
    checkpoints = {}
    for place, label in enumerate(labels):
        scores = {"acc": value(0.75 - 0.1 * place), "acc_norm": value(0.5)}
        known = {"items": 100, "samples": 35.25 if place else 32.25, "full_samples": 128.0}
        checkpoints[label] = {task: {**known, "metrics": scores} for task in tasks if task != "notes"}
        text = {"nelbo": {"value": 3.0, "error": None, "low": None, "high": None}}
        checkpoints[label]["notes"] = {"items": 1, "samples": 8.0, "full_samples": 8.0, "metrics": text}
    differences = {
        label: {
            "choices0": {"acc": difference(-0.1, -0.15, -0.05, "worse", left_out=10)},
            "choices1": {"acc": difference(0.01, -0.02, 0.04, "no difference shown")},
            "notes": {"nelbo": difference(0.25, None, None, "no difference shown")},
        }
        for label in labels[1:]
    }
    return {
        "metrics": METRICS, "tasks": tasks, "checkpoints": checkpoints, "baseline": labels[0],
        "average_tasks": [f"choices{index}" for index in range(proportions)] if proportions > 1 else [],
        "average": {label: value(0.6) for label in labels} if proportions > 1 else {},
        "differences": differences,
        "average_differences": {label: difference(-0.05, -0.07, -0.03, "worse") for label in labels[1:]},
    }  # fmt: skip


def printed(table, width=100):
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def cells(shown, first):
    """The filled cells of the rows whose first cell is `first`, without it."""
    tables = [each for each in getattr(shown, "renderables", [shown]) if isinstance(each, Table)]
    rows = [[str(cell).strip() for cell in row] for table in tables for row in zip(*(c.cells for c in table.columns))]
    return [[cell for cell in row[1:] if cell] for row in rows if row[0] == first]


def test_one_checkpoint():
    shown = eval_table(made(["dense"]))
    text = printed(shown)
    assert cells(shown, "choices1") == [["100 items", "32.25 of 128 samples"]]
    assert cells(shown, "acc, % ↑") == [["75.00 ± 1.00", "[73.00, 77.00]"]] * 2
    assert cells(shown, "notes") == [["1 item", "8 samples"]] and cells(shown, "nelbo, nats ↓") == [["3.0000"]]
    assert cells(shown, "mean of 2 tasks, %") == [["60.00 ± 1.00", "[58.00, 62.00]"]]
    assert "standard error over items" in text and "difference" not in text


def test_every_metric():
    shown = eval_table(made(["dense"]), every_metric=True)
    assert len(cells(shown, "acc, % ↑")) == 2 and cells(shown, "acc_norm, % ↑")[0] == ["50.00 ± 1.00", "[48.00, 52.00]"]


def test_checkpoints_against_the_first():
    shown = eval_table(made(["dense", "pruned"]))
    text = printed(shown)
    lines = [line.strip() for line in text.splitlines()]
    assert "choices0: acc, % ↑ (100 items, 33.75 of 128 samples)" in lines
    assert "notes: nelbo, nats ↓ (1 item, 8 samples)" in lines and "mean of 2 tasks, % (choices0, choices1)" in lines
    assert cells(shown, "dense")[0] == ["75.00 ± 1.00"]
    assert cells(shown, "pruned") == [
        ["65.00 ± 1.00", "-10.00 [-15.00, -5.00]", "worse (90 shared)"],
        ["65.00 ± 1.00", "+1.00 [-2.00, +4.00]", "no difference shown"],
        ["3.0000", "+0.2500", "no difference shown"],
        ["60.00 ± 1.00", "-5.00 [-7.00, -3.00]", "worse"],
    ]
    assert "difference: against dense, on the same items" in text


def test_what_is_relative_to_the_first_has_no_row_for_it():
    summary = made(["dense", "x", "y"], proportions=0)
    summary["metrics"] |= {"kl": asdict(KNOWN["kl"])}
    summary["tasks"]["notes"]["metrics"].append("kl")
    for label, number in (("x", 0.25), ("y", 0.5)):
        summary["checkpoints"][label]["notes"]["metrics"]["kl"] = value(number)
    summary["differences"]["y"]["notes"]["kl"] = difference(0.25, 0.125, 0.375, "worse")
    shown = eval_table(summary, every_metric=True)
    assert cells(shown, "x")[1] == ["0.2500 ± 0.0100"] and len(cells(shown, "dense")) == 1
    assert cells(shown, "y")[1] == ["0.5000 ± 0.0100", "+0.2500 [+0.1250, +0.3750]", "worse"]
    text = " ".join(printed(shown).split())
    assert "kl (reference: dense), nats ↓" in text
    assert "where dense is the reference: difference against the first checkpoint below it" in text


def test_what_cannot_be_compared_says_so():
    summary = made(["dense", "pruned"], proportions=1)
    summary["differences"]["pruned"]["choices0"] = {}
    shown = eval_table(summary)
    text = printed(shown)
    assert cells(shown, "pruned")[0] == ["65.00 ± 1.00", "no item in common"] and "mean of" not in text
    summary["checkpoints"]["pruned"]["choices0"]["items"] = 80
    assert "choices0: acc, % ↑ (80-100 items, " in printed(eval_table(summary))


def test_common_names_fit_a_terminal_of_80_columns():
    summary = made(["dense", "structprune-0.5"])
    summary["checkpoints"]["structprune-0.5"]["notes"]["metrics"]["nelbo"] = value(4.3324)
    gap = difference(0.1, 0.09, 0.12, "no difference shown")
    summary["differences"]["structprune-0.5"]["notes"]["nelbo"] = gap
    lines = printed(eval_table(summary, every_metric=True), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert " structprune-0.5 65.00 ± 1.00 -10.00 [-15.00, -5.00] worse (90 shared)" in map(str.rstrip, lines)
    assert " structprune-0.5 4.3324 ± 0.0100 +0.1000 [+0.0900, +0.1200] no difference shown" in map(str.rstrip, lines)


@pytest.mark.parametrize("checkpoints", [1, 2, 6])
@pytest.mark.parametrize("tasks", [1, 10])
def test_no_figure_is_cut_at_100_columns(checkpoints, tasks):
    labels = [f"LLaDA-8B-Base-structured-0.{index}-with-a-long-name" for index in range(checkpoints)]
    summary = made(labels, tasks)
    text = printed(eval_table(summary))
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    assert text.count("±") == checkpoints * (tasks + (tasks > 1)) + 1  # and the caption's
