"""Figures of a small evaluation by hand."""

import json
import math

import pytest

from structprune.errors import UserError
from structprune.evaluation.results import Choices, Generation, Window
from structprune.evaluation.summary import describe, estimate, summarise, wilson


def answered(task, right, norm=None, samples=16):
    """Items of two answers: the first is gold; right and norm say whether acc and acc_norm count them."""
    rows = []
    for index, (good, good_norm) in enumerate(zip(right, norm or right, strict=True)):
        metrics = {"acc": float(good), "acc_norm": float(good_norm)}
        rows.append(Choices(task, str(index), (-10.0, -11.0), (0.1, 0.1), (1, 1), 0, samples, 128, metrics))
    return rows


def windows(values, nats=None, tokens=None):
    count = len(values)
    triples = zip(values, nats or values, tokens or [1] * count, strict=True)
    return [Window("notes", str(index), v, n, t, 4, 4) for index, (v, n, t) in enumerate(triples)]


def test_a_proportion():
    result = estimate(answered("t", [True, True, True, False]), "acc")
    assert result["value"] == 0.75 and result["error"] == pytest.approx(0.5 / 2)  # deviation of 1 1 1 0 is 0.5
    assert (result["low"], result["high"]) == wilson(0.75, 4)


def test_wilson_as_published():
    """R. G. Newcombe, Statistics in Medicine 17, 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for good, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(good / count, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1.0, 20)[1] == 1


def test_a_mean():
    result = estimate(windows([1.0, 2.0, 6.0]), "nelbo")
    error = math.sqrt(7 / 3)  # deviations -2, -1, 3
    assert (result["value"], result["error"]) == (3, pytest.approx(error))
    assert result["high"] - 3 == pytest.approx(3 - result["low"]) and result["high"] - 3 > 1.96 * error


def test_a_ratio_of_sums_and_its_error():
    result = estimate(windows([0.0, 0.0], nats=[2.0, 10.0], tokens=[2, 2]), "masked_ce")
    assert result["value"] == 3 and result["error"] == pytest.approx(2)  # residuals -4, 4: sqrt(32 / 2) / 2
    result = estimate(windows([0.0, 0.0], nats=[2.0, 4.0], tokens=[1, 2]), "masked_ce")
    assert (result["value"], result["error"]) == (2, 0)  # every token costs 2, windows of any size agree


def test_one_item_has_no_error():
    assert estimate(windows([2.5]), "nelbo") == {"value": 2.5, "error": None, "low": None, "high": None}


def test_samples_spent():
    result = describe(answered("t", [True], samples=16) + answered("t", [True], samples=48))
    assert (result["items"], result["samples"], result["full_samples"]) == (2, 32, 128)


def test_two_checkpoints_and_three_tasks():
    dense = {
        "a": answered("a", [True] * 5 + [False] * 5, [True] * 10),
        "b": answered("b", [True] * 10 + [False] * 10),
        "notes": windows([2.0] * 8),
    }
    pruned = {
        "a": answered("a", [False] * 10, [True] * 10),
        "b": answered("b", [False] * 20),
        "notes": windows([2.5] * 8),
    }
    result = summarise({"dense": dense, "pruned": pruned}, resamples=2000)
    assert json.loads(json.dumps(result)) == result
    assert {task: each["main"] for task, each in result["tasks"].items()} == {
        "a": "acc",
        "b": "acc",
        "notes": "nelbo",
    }
    assert result["average_tasks"] == ["a", "b"]  # nats are no proportion
    assert result["average"]["dense"]["value"] == 0.5 and result["average"]["pruned"]["value"] == 0
    errors = [
        result["checkpoints"]["dense"][task]["metrics"][name]["error"] for task, name in (("a", "acc"), ("b", "acc"))
    ]
    assert result["average"]["dense"]["error"] == pytest.approx(math.hypot(*errors) / 2)
    assert result["differences"].keys() == {"pruned"} and result["baseline"] == "dense"
    differences = result["differences"]["pruned"]
    assert differences["a"]["acc_norm"] == {
        "difference": 0, "low": None, "high": None, "items": 10, "left_out": 0, "verdict": "no difference shown",
    }  # fmt: skip
    assert differences["b"]["acc"]["difference"] == -0.5 and differences["b"]["acc"]["verdict"] == "worse"
    assert differences["notes"]["nelbo"]["low"] == 0.5 and differences["notes"]["nelbo"]["verdict"] == "worse"
    mean = result["average_differences"]["pruned"]
    assert mean["difference"] == -0.5 and mean["verdict"] == "worse" and mean["items"] == 30
    assert -0.5 - 0.5 / 2 < mean["low"] < -0.5 < mean["high"] < -0.5 + 0.5 / 2


def test_the_first_is_the_baseline():
    rows = {name: {"notes": windows([value] * 6)} for name, value in (("y", 2.0), ("x", 1.0), ("z", 3.0))}
    result = summarise(rows, resamples=20)
    shown = {label: each["notes"]["nelbo"]["verdict"] for label, each in result["differences"].items()}
    assert shown == {"x": "better", "z": "worse"} and result["average"] == {} and result["average_differences"] == {}


def test_metrics_relative_to_the_first_are_compared_among_the_others():
    """20 and 30 nats of 10 tokens a window: 2 and 3 nats a token."""
    rows = {"dense": [Window("notes", str(index), 1.0, 9.0, 10, 4, 4, 5) for index in range(6)]}
    for label, nats in (("x", 20.0), ("y", 30.0)):
        rows[label] = [Window("notes", str(n), 1.5, 9.0, 10, 4, 4, 5, nats + n % 2, 9 - n % 3) for n in range(6)]
    result = summarise({label: {"notes": each} for label, each in rows.items()}, resamples=20)
    assert result["tasks"]["notes"]["metrics"] == ["nelbo", "masked_ce", "masked_acc", "kl", "agreement"]
    assert "kl" not in result["checkpoints"]["dense"]["notes"]["metrics"]
    assert result["checkpoints"]["x"]["notes"]["metrics"]["kl"]["value"] == pytest.approx(2.05)
    assert result["checkpoints"]["y"]["notes"]["metrics"]["agreement"]["value"] == pytest.approx(0.8)
    assert result["differences"]["x"]["notes"].keys() == {"nelbo", "masked_ce", "masked_acc"}
    gap = result["differences"]["y"]["notes"]
    assert gap["kl"]["difference"] == pytest.approx(1) and gap["kl"]["verdict"] == "worse"
    assert gap["nelbo"]["difference"] == 0.5 and gap["agreement"]["difference"] == 0


def test_items_that_only_one_has_are_left_out():
    long, short = windows([1.0] * 10), windows([1.5] * 6)
    result = summarise({"x": {"notes": long}, "y": {"notes": short}}, resamples=20)
    difference = result["differences"]["y"]["notes"]["nelbo"]
    assert (difference["difference"], difference["items"], difference["left_out"]) == (0.5, 6, 4)
    assert result["checkpoints"]["x"]["notes"]["items"] == 10


def test_no_item_or_task_in_common_is_no_comparison():
    other = [Window("notes", f"other {index}", 1.0, 1.0, 1, 1, 1) for index in range(6)]
    rows = {"x": {"notes": windows([1.0] * 6)}, "y": {"notes": other}, "z": {"b": answered("b", [True])}}
    assert summarise(rows, resamples=20)["differences"] == {"y": {"notes": {}}, "z": {}}


def test_one_checkpoint_has_nothing_to_be_compared_with():
    result = summarise({"x": {"gsm8k": [Generation("gsm8k", "1", "4", "4", {"exact_match": 1.0})]}})
    assert result["differences"] == {} and result["checkpoints"]["x"]["gsm8k"]["metrics"]["exact_match"]["value"] == 1


def test_checkpoints_without_a_common_metric():
    generated = [Generation("notes", "1", "4", "4", {"exact_match": 1.0})]
    with pytest.raises(UserError, match="task 'notes' has no metric that all checkpoints have: evaluate them on the"):
        summarise({"x": {"notes": windows([1.0])}, "y": {"notes": generated}})
