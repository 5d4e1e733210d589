"""What a checkpoint went through before, from its report, and how card and table say it."""

import json

import pytest

from structprune.checkpoint.lineage import earlier_steps, in_words, removed_in_all
from structprune.cli.main import main

PRUNED = {"step": "pruned", "source": "GSAI-ML/LLaDA-8B-Base", "share": 0.3}


def write(directory, report):
    (directory / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    return directory


def test_steps_are_those_of_its_report_oldest_first(tmp_path):
    recoveries = [
        {"teacher": "dense", "tokens": 2000, "kept": "input"},
        {"teacher": "dense", "tokens": 1_000_000, "kept": "trained"},
    ]
    report = {
        "versions": {"structprune": "1"}, "source": "llada-0.3", "ratio": 0.25, "lineage": [PRUNED],
        "recoveries": recoveries,
    }  # fmt: skip
    steps = earlier_steps(write(tmp_path, report))
    assert steps == [
        PRUNED,
        {"step": "pruned", "source": "llada-0.3", "share": 0.25},
        {"step": "trained back", "source": "dense", "tokens": 1_000_000},  # the one without a gain left no trace
    ]
    assert in_words(steps) == (
        "pruned from `GSAI-ML/LLaDA-8B-Base` (30.0 %), pruned from `llada-0.3` (25.0 %), trained back against `dense`"
        " (1,000,000 tokens)"
    )


def test_shares_of_prunings_multiply():
    masked = {"step": "masked", "source": "b", "share": 0.5}  # zeros stay where they are
    learnt = {"step": "trained back", "source": "a", "tokens": 2000}
    assert removed_in_all([PRUNED, learnt, masked], 0.5) == pytest.approx(1 - 0.7 * 0.5)
    assert removed_in_all([], 0.3) == pytest.approx(0.3)


def test_masks_are_a_step_too(tmp_path):
    report = {"versions": {"structprune": "1"}, "source": "llada", "sparsity": {"total": 0.5}}
    assert earlier_steps(write(tmp_path, report)) == [{"step": "masked", "source": "llada", "share": 0.5}]


@pytest.mark.parametrize("report", [{}, {"accuracy": 0.5}, {"recoveries": []}, "no JSON", "[1, 2]"])
def test_a_report_of_another_program_says_nothing(tmp_path, report):
    assert earlier_steps(write(tmp_path, report)) == []
    assert earlier_steps(tmp_path / "nowhere") == []


@pytest.mark.slow
def test_a_pruned_input_is_not_called_dense(tiny_checkpoint, prune_command, text_path, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(prune_command(tiny_checkpoint(), first, text_path, "--ratio", "0.2")) == 0
    assert "dense" in capsys.readouterr().out and "| | dense | pruned |" in (first / "README.md").read_text()
    assert json.loads((first / "report.json").read_text())["lineage"] == []
    assert main(prune_command(first, second, text_path, "--ratio", "0.2")) == 0
    shown, card = capsys.readouterr().out, (second / "README.md").read_text()
    assert "input" in shown and "dense" not in shown
    assert "`first` was pruned from `llada-tiny`" in card and "| | input | pruned |" in card
    report = json.loads((second / "report.json").read_text())
    (step,) = report["lineage"]
    assert report["ratio_of_dense"] == pytest.approx(1 - (1 - step["share"]) * (1 - report["ratio"]))
    total = f"{100 * report['ratio_of_dense']:.1f} % of the block projections of"
    assert f"In all, {total} `llada-tiny` were removed." in card and f"in all {total}" in " ".join(shown.split())
    assert (step["step"], step["source"]) == ("pruned", "llada-tiny") and 0.1 < step["share"] < 0.3
