"""What `structprune prune` shows: of a finished structured run, and of a dry run."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from structprune.cli.prune import Request
    from structprune.config import Config
    from structprune.runs.work import Work

NOTHING = "Nothing was written."


def closing(report: dict, out: Path, source_bytes: int) -> list:
    """The table and the last lines of a structured run.

    Args:
        source_bytes: of the weights that it began with.
    """
    from structprune.checkpoint.learnt_text import LEARNT
    from structprune.report.tables import run_table

    texts = ("calibration.safetensors", LEARNT)
    after = sum(path.stat().st_size for path in out.glob("*.safetensors") if path.name not in texts)
    return [
        run_table(report, (source_bytes, after)),
        f"Wrote {out} (model, plan.json, calibration.safetensors, report.json, README.md)",
        f"Load it anywhere: AutoModelForCausalLM.from_pretrained('{out}', trust_remote_code=True)",
    ]


def show_dry_run(request: "Request", work: "Work") -> None:
    """Check all that the run would check before it reads weights, and show what inspection says of each ratio."""
    from structprune.cli.console import show
    from structprune.runs.checks import checked_prune
    from structprune.runs.inspect import inspect_checkpoint, inspect_masking
    from structprune.runs.schedule import Schedule

    checkpoint, outputs, config, overwrite = request
    work.workers.in_turn(lambda: checked_prune(checkpoint, outputs, config, overwrite, work=work))
    inspect = inspect_checkpoint if config.method == "structured" else inspect_masking
    for ratio in outputs if work.workers.main else ():
        show(*inspection_tables(inspect(checkpoint, Schedule(config).at(ratio)), config))
    show(NOTHING, shown=work.workers.main)


def inspection_tables(result: dict, config: "Config") -> list:
    """Tables of what inspection says of a run."""
    from structprune.report.tables import inspect_tables, mask_inspect_tables

    return list((inspect_tables if config.method == "structured" else mask_inspect_tables)(result))
