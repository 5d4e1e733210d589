"""scripts/bench/bench_evaluation.py: the published loop by hand, its figures, and a small run."""

import json
import re
from pathlib import Path

import pytest
import torch

from structprune.evaluation.choices import Answer, Item, MonteCarlo, Scored, score_items
from structprune.models.encode import Batches

pytestmark = pytest.mark.slow

ROWS = [
    {"goal": "Dry a shoe.", "sol1": "Use paper.", "sol2": "Use a long spoon of soup.", "label": 0},
    {"goal": "Open a jar.", "sol1": "Sing.", "sol2": "Warm the lid.", "label": 1},
    {"goal": "Cool tea.", "sol1": "Add ice.", "sol2": "Add sand.", "label": 0},
]


@pytest.fixture
def bench(scripts):
    return scripts("bench_evaluation")


@pytest.fixture
def piqa(tmp_path) -> Path:
    path = tmp_path / "piqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_the_loop_estimates_what_ours_does(bench, tiny_model, cfg_scale):
    model = tiny_model()
    answers = tuple(Answer(torch.arange(3), torch.tensor(ids), 1) for ids in ([7], [5, 6, 9, 11, 13]))
    settings, item = MonteCarlo(512, cfg_scale=cfg_scale), Item("a", answers)
    (loop,) = bench.score_by_loop(model, [item], settings)
    (ours,) = score_items(model, [item], settings, Batches(1000))
    assert loop.log_likelihoods[0] == pytest.approx(ours.log_likelihoods[0], rel=1e-5)  # one token: exact
    error = (loop.errors[1] ** 2 + ours.errors[1] ** 2) ** 0.5
    assert error < 0.03 * -ours.log_likelihoods[1]
    assert abs(loop.log_likelihoods[1] - ours.log_likelihoods[1]) < 3 * error


def test_the_loop_runs_a_doubled_batch_over_all_positions(bench, tiny_model):
    model, shapes = tiny_model(), []
    model.output_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    answer = Answer(torch.arange(3), torch.arange(4), 1)
    with torch.inference_mode():
        blocks = bench.loop_answer(model, answer, MonteCarlo(16, 8, cfg_scale=0.5), torch.Generator().manual_seed(0))
    assert len(blocks) == 2 and shapes == [(16, 7, 2048)] * 2


def scored(*values, error: float = 1.0, samples: int = 16) -> Scored:
    return Scored("a", values, (error,) * len(values), samples)


def test_deviations_by_hand(bench):
    result = bench.deviations([scored(-10, -20, error=3.0)], [scored(-5, -35, error=4.0)])
    assert result["answers"] == 2
    assert result["mean"] == pytest.approx((-1 + 3) / 2)  # errors 3 and 4 make 5
    assert result["quantiles"][2] == pytest.approx(1)
    assert [result[f"within_{limit}"] for limit in (1, 2, 3)] == [0.5, 0.5, 1]
    exact = bench.deviations([scored(-10, error=0.0), scored(-1, -2)], [scored(-10, error=0.0), scored(-1, -3)])
    assert exact["answers"] == 2 and exact["mean"] == pytest.approx(0.5 / 2**0.5)


def test_agreement_by_hand(bench):
    items = [Item("a", (Answer(torch.arange(1), torch.arange(1), 2), Answer(torch.arange(1), torch.arange(1), 4)))]
    # by sum the first of -10, -12 and the second of -12, -10; by size 2 and 4 the second both times
    assert bench.agreement(items, [scored(-10, -12)], [scored(-12, -10)]) == {"raw": 0, "normalised": 1}


def test_ratios_are_medians_over_rounds(bench):
    seconds = {bench.LOOP: [8.0, 9.0, 40.0], bench.FULL: [4.0, 3.0, 10.0], bench.ADAPTIVE: [1.0, 3.0, 2.0]}
    items = [Item("a", (Answer(torch.arange(1), torch.arange(1), 2),) * 2)]
    estimates = [scored(-10.0, -12.0)]
    result = {side: estimates for side in (bench.LOOP, bench.FULL, bench.ADAPTIVE, bench.OTHER)}
    faster = bench.summarise(items, seconds | {bench.OTHER: [1.0]}, result)["times_faster"]
    assert faster[bench.FULL] == {"median": 3, "low": 2, "high": 4, "in_all": 57 / 17, "wanted": 1.8}
    assert faster[bench.ADAPTIVE]["median"] == 8


def test_a_small_run_writes_its_figures(bench, piqa, tmp_path, capsys):
    out = tmp_path / "speed.json"
    arguments = f"--piqa {piqa} --items 2 --rounds 2 --samples 16 --threads 1 --out {out}".split()
    assert bench.main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["machine"]["threads"] == 1
    assert result["settings"] | {"items": 2, "samples": 16, "cfg_scale": 0.5} == result["settings"]
    assert [len(each) for each in result["seconds"].values()] == [2] * 4
    assert set(result["times_faster"]) == {"full", "adaptive"}
    assert result["agreement"]["adaptive with full"] == {"raw": 1, "normalised": 1}  # two blocks are all there are
    assert "published loop" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ("--items 9", "--items = 9: .* has 3 that fit the model"),
        ("--items 0", "--items = 0: give at least 1"),
        ("--items 3 --rounds 4", "too few for --rounds = 4"),
        ("--items 3 --rounds 1 --samples 8", "standard errors need at least two blocks of 8"),
        ("--items 3 --rounds 1 --samples 20", "samples = 20 is not a multiple of block = 8"),
        ("--unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_what_is_refused(bench, piqa, tmp_path, capsys, changes, message):
    assert bench.main(["--piqa", str(piqa), "--out", str(tmp_path / "x.json"), *changes.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "x.json").exists()
