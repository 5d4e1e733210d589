"""What the verbs do, with progress on stderr and tables on stdout."""

import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from structprune.bench.settings import BenchSettings
from structprune.checkpoint.save import check_output
from structprune.config import Config, ModelSettings
from structprune.errors import Interrupted, UserError
from structprune.evaluation.settings import EvaluationConfig
from structprune.evaluation.workers import workers
from structprune.report.bench_tables import bench_tables
from structprune.report.eval_tables import eval_table
from structprune.report.progress import progress_bars
from structprune.report.tables import inspect_tables, mask_inspect_tables, mask_table, run_table
from structprune.runs.bench import bench
from structprune.runs.checkpoints import mask_checkpoint, prune_checkpoint
from structprune.runs.evaluate import evaluate
from structprune.runs.inspect import inspect_checkpoint
from structprune.runs.inspect_masks import inspect_masking
from structprune.structured.plan import Plan


def prune_and_show(checkpoint: str, out: Path, config: Config, plan: Path | None, overwrite: bool) -> None:
    """`structprune prune`: load, prune, save, and print the result.

    Raises:
        UserError: anything the user can mend, before the long work where it can be known then.
    """
    given = None if plan is None else Plan.load(plan)
    with progress_bars(Console(stderr=True)) as track:
        written = prune_checkpoint(checkpoint, out, config, given, overwrite, track)
    after = sum(path.stat().st_size for path in out.glob("*.safetensors") if path.name != "calibration.safetensors")
    console = Console()
    console.print(run_table(written.result.report, (written.source_bytes, after)))
    console.print(f"Wrote {out} (model, plan.json, calibration.safetensors, report.json, README.md)", soft_wrap=True)
    console.print(
        f"Load it anywhere: AutoModelForCausalLM.from_pretrained('{out}', trust_remote_code=True)", soft_wrap=True
    )


def mask_and_show(checkpoint: str, out: Path, config: Config, overwrite: bool) -> None:
    """`structprune prune --method unstructured|nm`: load, mask, save in the source's layout, and print the result.

    Raises:
        UserError: anything the user can mend, before the long work where it can be known then.
    """
    with progress_bars(Console(stderr=True)) as track:
        masked = mask_checkpoint(checkpoint, out, config, overwrite, track).result
    console = Console()
    console.print(mask_table(masked.report))
    text = ", calibration.safetensors" if masked.calibration is not None else ""
    made = f"Wrote {out} (the checkpoint in its own layout, masks.safetensors, report.json, README.md{text})"
    console.print(made, soft_wrap=True)
    console.print(
        "The file is no smaller and no faster as it is: zeros pay with 2:4 kernels on a GPU; for a smaller dense model"
        " use --method structured.",
        soft_wrap=True,
    )


def inspect_and_show(checkpoint: str, config: Config, as_json: bool) -> None:
    """`structprune inspect`."""
    masks = config.method != "structured"
    found = inspect_masking(checkpoint, config) if masks else inspect_checkpoint(checkpoint, config)
    console = Console()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for table in mask_inspect_tables(found) if masks else inspect_tables(found):
        console.print(table)
    console.print("Nothing was read but config.json and safetensors headers, and nothing written.")


def evaluate_and_show(
    checkpoints: list[str], config: EvaluationConfig, out: Path, against: Path | None, overwrite: bool
) -> None:
    """`structprune eval`: on the first of several processes with progress, table and warnings.

    Raises:
        UserError: anything the user can mend.
    """
    with workers() as place, progress_bars(Console(stderr=True, quiet=not place.main)) as track:
        warn = lambda line: print(f"structprune: warning: {line}", file=sys.stderr) if place.main else None  # noqa: E731
        try:
            found = evaluate(checkpoints, config, out, against, overwrite, track, place, warn)
        except KeyboardInterrupt as error:
            if not out.exists():
                raise
            raise Interrupted(f"what is done is kept in {out}: the same command goes on") from error
    if found is None:
        return
    console = Console()
    console.print(eval_table(found.summary, every_metric=True))
    for line in found.warnings:
        console.print(f"[bold]Warning:[/bold] {escape(line)}", soft_wrap=True)
    made = f"Wrote {out} (results.json, items/: a line per item{'' if against is None else ', against.json'})"
    console.print(made, soft_wrap=True)


def bench_and_show(
    checkpoints: list[str], settings: BenchSettings, out: Path, place: ModelSettings, plots: bool, overwrite: bool
) -> None:
    """`structprune bench`.

    Raises:
        UserError: anything the user can mend.
    """
    try:
        with progress_bars(Console(stderr=True)) as track:
            found = bench(checkpoints, settings, out, place, plots, overwrite, track)
    except torch.OutOfMemoryError as error:
        raise UserError(str(error)) from error
    console = Console()
    for table in bench_tables(found.result):
        console.print(table)
    masked = found.result["semi_structured"]
    if masked and masked["refused"]:
        console.print(f"2:4 kernels were not measured: {escape(masked['refused'])}", soft_wrap=True)
    console.print("Wrote " + ", ".join(str(path) for path in found.made), soft_wrap=True)


def demo_and_show(out: Path, overwrite: bool) -> None:
    """`structprune demo`.

    Raises:
        UserError: an output that cannot be written, or matplotlib missing.
    """
    from structprune.report.plots import check_matplotlib
    from structprune.runs.demo import demo_table, run_demo

    check_matplotlib()
    check_output(out, None, overwrite, 100_000_000)
    with progress_bars(Console(stderr=True)) as track:
        found = run_demo(out, track)
    console = Console()
    console.print(demo_table(found.rows, found.dense))
    console.print("Wrote " + ", ".join(str(path) for path in found.made), soft_wrap=True)
    example = next(path for path in found.made if path.is_dir())
    console.print(
        f"Load one anywhere: AutoModelForCausalLM.from_pretrained('{example}', trust_remote_code=True)", soft_wrap=True
    )
