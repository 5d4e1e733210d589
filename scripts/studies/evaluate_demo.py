"""The README's evaluation: the embedded model against the models of `structprune demo`, on text and a local PIQA.

    structprune demo --out structprune-demo
    python -m scripts.studies.evaluate_demo --demo structprune-demo --piqa valid.jsonl

PIQA (arXiv 1911.11641) is not part of the package: its paper's page has valid.jsonl and valid-labels.lst. An
interrupted run continues where it stopped; summary, settings and machine are written to one JSON file.
"""

import argparse
import shutil
import sys
from pathlib import Path

from scripts.tools.script_line import OneLineParser, one_line, result_file, show_result
from structprune.assets import model_directory, text_file
from structprune.bench.machine import describe_machine
from structprune.cli.console import progress_bars
from structprune.errors import UserError
from structprune.evaluation.results import json_text
from structprune.evaluation.settings import EvaluationConfig
from structprune.files import write_whole
from structprune.report.eval_tables import eval_table
from structprune.runs.evaluate import Session, evaluate

PRUNED = ("structprune-0.3", "structprune-0.5")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="directory of `structprune demo`")
    parser.add_argument("--piqa", type=Path, required=True, help="PIQA's validation set, labels beside it")
    parser.add_argument(
        "--limit", type=int, default=140, help="questions (the 143rd is too long for the embedded model)"
    )
    parser.add_argument("--samples", type=int, default=32, help="at most so many Monte Carlo samples per answer")
    parser.add_argument("--work", type=Path, default=Path("evaluation-of-demo"))
    parser.add_argument("--out", type=result_file, default=Path(__file__).parents[1] / "results" / "evaluation.json")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """Evaluate, print the tables, and write the figures."""
    missing = [name for name in PRUNED if not (options.demo / name).is_dir()]
    if missing:
        raise UserError(f"'{options.demo}' has no {missing[0]}: run structprune demo --out {options.demo} first")
    dense = options.work / "dense"  # a copy, for its name in tables
    if not dense.is_dir():
        shutil.copytree(model_directory(), dense)
    config = EvaluationConfig.load(
        overrides={
            "evaluation.source": str(text_file("heldout.txt")),
            "evaluation.tasks": [f"piqa:{options.piqa}"],
            "evaluation.limit": options.limit,
            "evaluation.samples": options.samples,
            "evaluation.adaptive": True,
        }
    )
    checkpoints = [str(dense), *(str(options.demo / name) for name in PRUNED)]
    with progress_bars() as track:
        evaluation = evaluate(checkpoints, config, options.work / "results", session=Session(track))
    assert evaluation is not None  # None only in further processes
    summary = evaluation.summary
    values = {"settings": evaluation.results.settings, "summary": summary, "machine": describe_machine()}
    write_whole(options.out, json_text(values))
    show_result(eval_table(summary, every_metric=True), out=options.out)


if __name__ == "__main__":
    sys.exit(one_line("evaluate_demo", lambda: run(parse_arguments())))
