"""The tables of "Sink-Aware Pruning" (arXiv 2602.17664) by one command: ours beside the published figures.

    python -m scripts.studies.reproduce --model GSAI-ML/LLaDA-8B-Base --table structured --out reproduction

needs structprune[eval], a GPU and, for the tasks' data, the network once. Finished models and evaluated chunks are
kept: the same command continues where it stopped. Without weights or network, everything runs on any checkpoint and a
local PIQA:

    python -m scripts.studies.reproduce --model DIR --tasks piqa:valid.jsonl --limit 20
        --calibration notes.txt --out small

The published figures were measured on LLaDA-8B-Base. For structured pruning, neither the baseline, nor what exactly
the ratio counts, nor code is published. Here the row without sinks is this package's own method on masked activations,
so that the two rows differ only in the sink weights.
"""

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from scripts.tools.script_line import OneLineParser, one_line, show_result
from structprune.bench.machine import describe_machine
from structprune.cli.console import progress_bars
from structprune.cli.main import main as command_line
from structprune.config import Config
from structprune.errors import UserError
from structprune.evaluation.results import json_text
from structprune.evaluation.settings import EvaluationConfig
from structprune.files import write_whole
from structprune.models.loading import load_config
from structprune.report.eval_tables import eval_table
from structprune.runs.evaluate import Session, evaluate
from structprune.workers import workers

NOTE = (
    "accuracies in percent; ± standard error over items; the published dense figures of ARC-C and WinoGrande do not"
    " match these settings (LLaDA's own report has 45.9 and 74.8)"
)
ROOT = Path(__file__).resolve().parents[2]
STRUCTURED = ("piqa", "winogrande", "arc_easy", "arc_challenge")
UNSTRUCTURED = ("mmlu", "arc_challenge", "piqa", "winogrande", "gsm8k", "hellaswag")


@dataclass(frozen=True)
class Variant:
    """A model of a table.

    Attributes:
        title: of its row. Its directory is named after the variant.
        config: a file in configs/, without the family's prefix.
        keys: configuration keys on top of it.
        published: task -> accuracy in percent (README of the released implementation).
        average: as published, over more tasks than are listed.
    """

    title: str
    config: str
    keys: dict = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)
    average: float | None = None


def _of(tasks: tuple[str, ...], *values: float) -> dict[str, float]:
    return dict(zip(tasks, values, strict=True))


MASKED = {"structured.arm": "masked"}
TABLES: dict[str, tuple[tuple[str, ...], dict[str, Variant]]] = {
    "structured": (
        STRUCTURED,
        {
            "masked-0.3": Variant("0.3, no sinks", "0.3", MASKED, _of(STRUCTURED, 68.34, 66.30, 69.07, 37.80)),
            "sinks-0.3": Variant("0.3, sink-aware", "0.3", {}, _of(STRUCTURED, 69.55, 67.40, 71.75, 38.20)),
            "masked-0.5": Variant("0.5, no sinks", "0.5", MASKED, _of(STRUCTURED, 58.98, 55.72, 48.53, 20.39)),
            "sinks-0.5": Variant("0.5, sink-aware", "0.5", {}, _of(STRUCTURED, 60.37, 57.24, 52.79, 23.62)),
        },
    ),
    "unstructured": (
        UNSTRUCTURED,
        {
            "wanda": Variant(
                "50 %, Wanda", "published/wanda", {}, _of(UNSTRUCTURED, 61.43, 39.08, 72.63, 64.56, 57.01, 67.52), 52.70
            ),
            "sink-wanda": Variant(
                "50 %, sink-Wanda", "published/sink-wanda", {},
                _of(UNSTRUCTURED, 62.16, 41.38, 73.18, 65.27, 55.88, 67.18), 53.18,
            ),
            "sparsegpt": Variant(
                "50 %, SparseGPT", "published/sparsegpt", {},
                _of(UNSTRUCTURED, 60.97, 39.68, 72.20, 64.64, 53.53, 66.90), 52.34,
            ),
            "sink-sparsegpt": Variant(
                "50 %, sink-SparseGPT", "published/sink-sparsegpt", {},
                _of(UNSTRUCTURED, 60.79, 39.59, 72.95, 65.82, 52.11, 67.35), 52.36,
            ),
        },
    ),
}  # fmt: skip
DENSE = Variant("dense", "", {}, _of(UNSTRUCTURED, 65.97, 43.00, 74.10, 69.30, 69.29, 72.70), 57.93)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint directory, or Hub id")
    parser.add_argument("--table", choices=TABLES, default="structured")
    parser.add_argument("--tasks", help="instead of the table's: names separated by commas, such as piqa:FILE.jsonl")
    parser.add_argument("--limit", type=int, help="at most so many documents per task")
    parser.add_argument("--adaptive", action="store_true", help="stop drawing samples once a choice is decided")
    parser.add_argument("--calibration", help="calibration text, instead of the configuration's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the pruning configuration"
    )
    parser.add_argument(
        "--eval-set", action="append", default=[], metavar="KEY=VALUE", help="a key of the evaluation's configuration"
    )
    parser.add_argument("--out", type=Path, default=Path("reproduction"))
    return parser.parse_args(arguments)


def prune_command(model: str, family: str, variant: Variant, out: Path, options: argparse.Namespace) -> list[str]:
    """The arguments of `structprune prune` for a variant."""
    folder, _, name = variant.config.rpartition("/")
    path = ROOT / "configs" / folder / f"{family}-{name}.yaml"
    keys = [f"{key}={value}" for key, value in variant.keys.items()] + options.set
    if folder:
        keys.append("masking.ratio=0.5")
    text = ["--calibration", options.calibration] if options.calibration else []
    return ["prune", model, "--out", str(out), "--config", str(path), *text, *(f"--set={key}" for key in keys)]


def make_models(options: argparse.Namespace, family: str) -> None:
    """Prune every variant whose checkpoint does not exist yet; outputs appear whole or not at all.

    Raises:
        UserError: pruning failed (its error is on stderr), or a checkpoint exists with other settings.
    """
    for name, variant in TABLES[options.table][1].items():
        directory = options.out / name
        command = prune_command(options.model, family, variant, directory, options)
        record = options.out / f"{name}.command.json"
        content = json_text({"settings": {"command": command[1:]}})
        if directory.is_dir():
            if not record.is_file() or record.read_bytes() != content:
                raise UserError(f"'{directory}' was made by another command: remove it, or choose another --out")
            continue
        write_whole(record, content)
        if command_line(command) != 0:
            raise UserError(f"{variant.title} could not be made (see above)")


def make_and_compare(options: argparse.Namespace, family: str, names: list[str]) -> dict:
    """Make the models (in the first process), then evaluate them and the dense one.

    Returns:
        The summary of `structprune eval`; empty in processes other than the first.
    """
    overrides = {"evaluation.tasks": names, "evaluation.adaptive": options.adaptive}
    overrides |= {} if options.limit is None else {"evaluation.limit": options.limit}
    config = EvaluationConfig.load(overrides=overrides | EvaluationConfig.parse(options.eval_set))
    checkpoints = [options.model, *(str(options.out / name) for name in TABLES[options.table][1])]
    with workers() as place:
        if place.main:
            make_models(options, family)
        place.wait()

        def warn(line: str) -> None:
            if place.main:
                print(f"reproduce: warning: {line}", file=sys.stderr)

        with progress_bars(Console(stderr=True, quiet=not place.main)) as track:
            results = evaluate(checkpoints, config, options.out / "evaluation", session=Session(track, place, warn))
    return {} if results is None else results.summary


def published_of(variant: Variant, task: str) -> float | None:
    """The published figure for a task, also if its data is read from a file (piqa:FILE)."""
    return next((value for name, value in variant.published.items() if task.partition(":")[0] == name), None)


def rows_of(summary: dict, options: argparse.Namespace) -> list[dict]:
    """For each variant its title, and for each task our figure with its error and the published one, in percent."""
    dense = replace(DENSE, average=DENSE.average if options.table == "unstructured" else None)
    variants = {"dense": dense, **TABLES[options.table][1]}
    rows = []
    for variant, (label, tasks) in zip(variants.values(), summary["checkpoints"].items(), strict=True):
        cells = {}
        for task, result in tasks.items():
            metrics = {
                name: {key: None if value[key] is None else 100 * value[key] for key in ("value", "error")}
                for name, value in result["metrics"].items()
            }
            cells[task] = {"metrics": metrics, "published": published_of(variant, task), "items": result["items"]}
        rows.append({"title": variant.title, "checkpoint": label, "tasks": cells, "stated_average": variant.average})
    return rows


def reproduction_table(rows: list[dict]) -> Table:
    """A section per task, a row per model: our metrics ± standard error, and the published figure."""
    table = Table(title="ours, and the published figure", box=box.SIMPLE_HEAD, caption=NOTE)
    for name in ("model", "ours", "published"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for task in rows[0]["tasks"]:
        table.add_section()
        table.add_row(task, f"{rows[0]['tasks'][task]['items']} items", "", style="bold")
        for row in rows:
            cell = row["tasks"][task]
            lines = [f"{name} {_shown(value)}" for name, value in cell["metrics"].items()]
            published = "-" if cell["published"] is None else f"{cell['published']:.2f}"
            table.add_row(f"  {row['title']}", "\n".join(lines), published)
    if any(row["stated_average"] is not None for row in rows):
        table.add_section()
        table.add_row("published average, over more tasks than are listed", "", "", style="bold")
        for row in rows:
            table.add_row(f"  {row['title']}", "", f"{row['stated_average']:.2f}")
    return table


def _shown(value: dict) -> str:
    error = "" if value["error"] is None else f" ± {value['error']:.2f}"
    return f"{value['value']:.2f}{error}"


def run(options: argparse.Namespace) -> None:
    """Make the models, evaluate them, print the tables, and write reproduction.json."""
    family = load_config(options.model)[1].name
    names = options.tasks.split(",") if options.tasks else list(TABLES[options.table][0])
    for variant in TABLES[options.table][1].values():  # refuse bad configurations before hours of work
        command = prune_command(options.model, family, variant, options.out, options)
        Config.load(command[5], [text.removeprefix("--set=") for text in command if text.startswith("--set=")])
    summary = make_and_compare(options, family, names)
    if not summary:
        return
    rows, path = rows_of(summary, options), options.out / "reproduction.json"
    settings = {name: str(value) for name, value in vars(options).items()}
    content = {"settings": settings, "machine": describe_machine(), "rows": rows, "summary": summary}
    write_whole(path, json_text(content))
    note = f"Wrote {path}; the models and the evaluation's items are in the same directory"
    show_result(reproduction_table(rows), eval_table(summary, every_metric=True), note)


def main(arguments: list[str] | None = None) -> int:
    """Run, and return the exit code."""
    return one_line("reproduce", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
