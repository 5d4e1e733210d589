"""Rows and their metrics by hand."""

import json
import math
from pathlib import Path

import pytest

from structprune.errors import UserError
from structprune.evaluation.metrics import METRICS, metric_of
from structprune.evaluation.results import (
    ROW,
    Choices,
    Continuation,
    Generation,
    Window,
    item_parts,
    metrics_of,
    parse_line,
    to_json,
)


def from_json(values):
    """The row of a line of a file."""
    return parse_line(json.dumps(values).encode(), ROW, Path("items.jsonl"), 1)


def choices(values=(-10.0, -12.0), sizes=(4, 6), gold=0, key="1", errors=None):
    metrics = {"acc": 1.0, "acc_norm": 0.0}
    return Choices("piqa", key, values, errors or (0.0,) * len(values), sizes, gold, 16, 128, metrics)


WINDOW = Window("notes", "0", 3.5, 420.0, 120, 8, 8)
TEXT = Generation(
    "gsm8k", "7", "so 3 + 4 = 7", "7", {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
)


def test_choice_by_hand():
    row = choices()  # -10 > -12, but -10/4 = -2.5 < -12/6 = -2
    assert (row.choice, row.choice_norm) == (0, 1)
    assert row.parts == {"acc": (1, 1), "acc_norm": (0, 1)}


def test_the_first_of_equals_is_chosen():
    assert choices((-3.0, -2.0, -2.0), (1, 1, 1)).choice == 1


@pytest.mark.parametrize("row", [choices(), choices(gold=None, errors=(None, 0.0)), WINDOW, TEXT])
def test_json_and_back(row):
    assert from_json(to_json(row)) == row


def test_what_follows_is_written_and_not_trusted():
    values = to_json(choices())
    assert values["kind"] == "choices" and values["choice"] == 0 and values["choice_norm"] == 1
    assert from_json({**values, "choice": 1}).choice == 0


def test_metrics_of_kinds():
    assert metrics_of([choices(), choices(key="2")]) == ["acc", "acc_norm"]
    assert metrics_of([WINDOW]) == ["nelbo", "masked_ce"]
    other = Generation("gsm8k", "8", "", None, {"exact_match,flexible-extract": 0.0})
    assert metrics_of([TEXT, other]) == ["exact_match,flexible-extract"]
    assert item_parts([WINDOW], "masked_ce") == {"0": (420, 120)} and item_parts([WINDOW], "nelbo") == {"0": (3.5, 1)}
    assert metrics_of([]) == []
    result = metric_of("exact_match,strict-match")
    assert result.name == "exact_match,strict-match" and result.proportion and result.higher_is_better
    assert {name for name in METRICS if not METRICS[name].higher_is_better} == {"nelbo", "masked_ce", "causal_ce", "kl"}
    assert {name for name in METRICS if METRICS[name].relative} == {"kl", "agreement", "kept"}


def test_metrics_of_fidelity():
    reference, other = (Window("notes", "0", 3.5, 420.0, 120, 8, 8, 30, *apart) for apart in ((), (60.0, 90)))
    assert metrics_of([reference]) == ["nelbo", "masked_ce", "masked_acc"]
    assert metrics_of([other]) == ["nelbo", "masked_ce", "masked_acc", "kl", "agreement"]
    assert other.parts["masked_acc"] == (30, 120) and other.parts["kl"] == (60, 120)
    assert other.parts["agreement"] == (90, 120) and from_json(to_json(other)) == other


def test_metrics_of_a_continuation():
    """Pairs 1 2, 2 1, 1 2, 2 3: three different ones of four."""
    reference, other = (Continuation("notes", "0", (1, 2, 1, 2, 3), "a b a b c", *kept) for kept in ((), (4,)))
    assert reference.parts == {"distinct": (3, 4)} and other.parts == {"distinct": (3, 4), "kept": (4, 5)}
    assert from_json(to_json(other)) == other


def test_no_masked_token_is_no_cross_entropy():
    assert metrics_of([Window("notes", "0", 0.0, 0.0, 0, 1, 1)]) == ["nelbo"]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: choices((math.nan, -1.0)), "item '1' of task 'piqa': the model gives nan"),
        (lambda: choices((-math.inf, -1.0)), "the model gives -inf: set model.dtype to float32"),
        (lambda: choices(errors=(0.0, math.inf)), "the model gives inf"),
        (lambda: Window("notes", "3", math.nan, 1.0, 1, 1, 1), "item '3' of task 'notes'"),
        (
            lambda: Window("notes", "3", 1.0, 1.0, 1, 1, 1, 1, math.inf, 1),
            "item '3' of task 'notes': the model",
        ),
        (lambda: Continuation("notes", "3", (1,), "a"), "item '3' of task 'notes' has 1 generated tokens, and needs 2"),
        (lambda: choices(sizes=(4, 0)), "a size of at least 1"),
        (lambda: choices(sizes=(4,)), "every answer needs"),
        (lambda: choices(gold=2), "gold answer 2, but there are 2"),
        (lambda: Generation("g", "1", "", None, {"bleu": 1.0}), "unknown metric 'bleu'"),
        (
            lambda: Generation("g", "1", "", None, {"exact": 1.0}),
            "unknown metric 'exact' (did you mean 'exact_match'?)",
        ),
        (lambda: Generation("g", "1", "", None, {}), "item '1' of task 'g' has no metric"),
        (lambda: Generation("g", "1", "", None, {"acc": math.nan}), "the model gives nan"),
        (lambda: from_json({"kind": "poem"}), "line 1 of 'items.jsonl' is damaged: evaluate again"),
        (lambda: from_json({"kind": "window", "task": "t"}), "line 1 of 'items.jsonl' is damaged: evaluate again"),
        (lambda: from_json([]), "line 1 of 'items.jsonl' is damaged: evaluate again"),
        (lambda: from_json(to_json(WINDOW) | {"samples": "8"}), "line 1 of 'items.jsonl' is damaged: evaluate again"),
    ],
)
def test_refused(make, words):
    with pytest.raises(UserError) as result:
        make()
    assert words in str(result.value) and "\n" not in str(result.value)
