"""The README's evaluation: the embedded model against what `structprune demo` makes of it, on text and a local PIQA.

    structprune demo --out structprune-demo
    python -m scripts.studies.evaluate_demo --demo structprune-demo --piqa valid.jsonl

PIQA (arXiv 1911.11641) is not shipped: valid.jsonl and valid-labels.lst lie beside its paper's page. Goes on where it
stopped; ends with the summary, the settings and the machine in one JSON file.
"""

import argparse
import shutil
import sys
from pathlib import Path

from rich.console import Console

from scripts.tools.script_line import OneLineParser, one_line, result_file
from structprune.assets import model_directory, text_file
from structprune.bench.machine import describe_machine
from structprune.cli.console import progress_bars
from structprune.errors import UserError
from structprune.evaluation.result_io import json_text
from structprune.evaluation.settings import EvaluationConfig
from structprune.files import write_whole
from structprune.report.eval_tables import eval_table
from structprune.runs.evaluate import evaluate

PRUNED = ("structprune-0.3", "structprune-0.5")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="directory of `structprune demo`")
    parser.add_argument("--piqa", type=Path, required=True, help="PIQA's validation set, labels beside it")
    parser.add_argument(
        "--limit", type=int, default=140, help="questions (the 143rd is too long for the embedded model)"
    )
    parser.add_argument("--samples", type=int, default=32, help="Monte Carlo samples an answer, at most")
    parser.add_argument("--work", type=Path, default=Path("evaluation-of-demo"))
    parser.add_argument("--out", type=result_file, default=Path(__file__).parents[1] / "results" / "evaluation.json")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """Evaluate, print, and keep the figures."""
    missing = [name for name in PRUNED if not (options.demo / name).is_dir()]
    if missing:
        raise UserError(f"'{options.demo}' has no {missing[0]}: run structprune demo --out {options.demo} first")
    dense = options.work / "dense"  # under a name that a table can show
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
        found = evaluate(checkpoints, config, options.work / "results", track=track)
    console = Console()
    console.print(eval_table(found.summary, every_metric=True))
    values = {"settings": found.results.settings, "summary": found.summary, "machine": describe_machine()}
    write_whole(options.out, json_text(values))
    console.print(f"Wrote {options.out}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(one_line("evaluate_demo", lambda: run(parse_arguments())))
