"""`structprune prune --recover`: its options, and what it shows."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from structprune.cli.pruned import NOTHING, closing, inspection_tables
from structprune.errors import UserError

if TYPE_CHECKING:
    from structprune.config import Config
    from structprune.recovery.settings import RecoverConfig
    from structprune.runs.gradual import ScheduleRun, Step
    from structprune.runs.schedule import Schedule

    Request = tuple[str, Path, Schedule, bool]  # checkpoint, output, schedule, overwrite

Recover = Annotated[
    bool,
    typer.Option(
        "--recover",
        help="Then train the result back against the checkpoint, on the calibration text or --recover-set"
        " data.source=FILE; --out is what was trained. A run that was killed goes on with the same command.",
    ),
]
RecoverFile = Annotated[
    Path | None,
    typer.Option(
        "--recover-config", help="YAML file of settings of the training; see configs/recover/.",
        show_default="built-in defaults",
    ),
]  # fmt: skip
RecoverSets = Annotated[
    list[str] | None,
    typer.Option(
        "--recover-set", metavar="KEY=VALUE", help="Set a key of the training: train.tokens=2000000. Repeatable."
    ),
]
Gradual = Annotated[
    bool,
    typer.Option(
        "--gradual",
        help="Of several ratios, prune each from the model trained back at the one before; all count against the"
        " checkpoint, and share train.tokens.",
    ),
]


def read_recovery(recover: bool, gradual: bool, config: Path | None, sets: list[str] | None) -> "RecoverConfig | None":
    """The configuration of the training; None where there is none.

    Raises:
        UserError: a key or value of it that cannot be, or an option that has no effect without --recover.
    """
    if not recover:
        idle = {"--recover-config": config, "--recover-set": sets, "--gradual": gradual}
        if names := [name for name, value in idle.items() if value]:
            raise UserError(f"{names[0]} has no effect without --recover: add it, or leave it out")
        return None
    from structprune.recovery.settings import RecoverConfig

    return RecoverConfig.load(config, sets)


def make_schedule(
    config: "Config",
    recovery: "RecoverConfig",
    ratios: list[float],
    gradual: bool,
    plan: Path | None,
    levels: Path | None,
) -> "Schedule":
    """What the options ask for; `plan` is a file."""
    from structprune.runs.schedule import Schedule
    from structprune.structured.plan import Plan

    return Schedule(config, recovery, tuple(ratios), gradual, None if plan is None else Plan.load(plan), levels)


def show_schedule(request: "Request", dry_run: bool) -> None:
    """Prune and train back, or plan it; of several processes, the first shows what was written.

    Args:
        request: the first arguments of `structprune.runs.gradual.prune_and_recover`.
    """
    (_plan if dry_run else _run)(request)


def _plan(request: "Request") -> None:
    """What the run would take; of several processes, which check as for a run, the first shows it."""
    from structprune.cli.console import show
    from structprune.progress import untracked
    from structprune.runs.evaluate import Session
    from structprune.runs.gradual import ScheduleRun
    from structprune.workers import workers

    with workers(reduces=True) as place:
        lines = _plan_lines(ScheduleRun(*request, Session(untracked, place)), request[2])
        show(*(lines if place.main else []))


def _plan_lines(run: "ScheduleRun", schedule: "Schedule") -> list:
    """What a dry run says of every output."""
    from structprune.report.recover_table import plan_lines

    lines: list = []
    for out, inspection, training in run.plan():
        lines += inspection_tables(inspection, schedule.config)
        lines += plan_lines(training, "predicted memory of the training", f"{out}: ")
    return [*lines, NOTHING]


def _run(request: "Request") -> None:
    """Progress goes to stderr; what was written is shown at the end, also after a failure, by the first process."""
    from structprune.cli.console import progress_of, show, warner
    from structprune.cli.work import stopping
    from structprune.models.denormals import flushed_denormals
    from structprune.runs.evaluate import Session
    from structprune.runs.gradual import ScheduleRun
    from structprune.workers import workers

    lines: list = []
    runs: list[ScheduleRun] = []  # at most one, once it could begin

    def kept() -> str:
        places = [place for run in runs for place in run.kept()]
        next_time = "begins anew, as --overwrite says" if request[3] else "goes on"
        return f"what is done is kept in {', '.join(map(str, places))}: the same command {next_time}" if places else ""

    try:
        with (
            flushed_denormals(),  # the first: worker threads keep what they begin with
            workers(reduces=True) as place,
            progress_of(place) as track,
            stopping(kept, lambda: runs[0].places) as stopper,
        ):
            runs.append(ScheduleRun(*request, Session(track, place, warner(place.main), stopper.watch)))
            for step in runs[0].steps():
                lines += _step_lines(step) if place.main else []
    finally:
        show(*lines)


def _step_lines(step: "Step") -> list:
    """Tables of a pruning and of its training, and where the model is."""
    from structprune.report.recover_table import no_gain, recover_table
    from structprune.report.tables import mask_table

    report, out = step.report, step.directory
    recovery = report["recoveries"][-1]
    if "sparsity" in report:
        table, last = (
            mask_table(report),
            [f"Wrote {out} (in the checkpoint's own layout, masks.safetensors, report.json)"],
        )
    else:
        table, *last = closing(report, out, step.source_bytes)
    last = [f"{out} is of an earlier run with the same request, which is not done again"] if step.earlier else last
    return [table, recover_table(recovery), *no_gain(recovery, "that were pruned"), *last]
