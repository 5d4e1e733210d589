"""`structprune prune`."""

from pathlib import Path
from typing import TYPE_CHECKING

from structprune.cli.configuration import read_config, read_ratios, set_keys
from structprune.cli.options import (
    Arm,
    BlockSize,
    CalibrationText,
    Checkpoint,
    ConfigFile,
    Debug,
    Device,
    DryRun,
    Dtype,
    Levels,
    MaskId,
    Method,
    NoRefit,
    Out,
    Overwrite,
    Pattern,
    Pickle,
    PlanFile,
    Ratios,
    Score,
    Sets,
    TargetLatency,
)
from structprune.cli.pruned import closing, show_dry_run
from structprune.cli.schedule import (
    Gradual,
    Recover,
    RecoverFile,
    RecoverSets,
    make_schedule,
    read_recovery,
    show_schedule,
)
from structprune.cli.work import ResumeMode, WorkPlace, check_alone, taken_from, work_of
from structprune.errors import UserError

if TYPE_CHECKING:
    from structprune.config import Config
    from structprune.runs.work import Work

    Request = tuple[str, dict[float | None, Path], Config, bool]  # checkpoint, outputs, configuration, overwrite

OF_TEXT = [
    f"calibration.{key}" for key in ("windows", "length", "steps", "interval", "copies", "subset", "split", "column")
]


def prune(
    checkpoint: Checkpoint,
    out: Out,
    method: Method = None,
    config: ConfigFile = None,
    ratio: Ratios = None,
    target_latency: TargetLatency = None,
    nm: Pattern = None,
    score: Score = None,
    arm: Arm = None,
    no_refit: NoRefit = False,
    sets: Sets = None,
    calibration: CalibrationText = None,
    plan: PlanFile = None,
    levels: Levels = None,
    work: WorkPlace = None,
    resume: ResumeMode = "auto",
    recover: Recover = False,
    recover_config: RecoverFile = None,
    recover_sets: RecoverSets = None,
    gradual: Gradual = False,
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
    mask_id: MaskId = None,
    block_size: BlockSize = None,
    allow_pickle: Pickle = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Refuses only contradictions on the command line itself; the run refuses the rest."""
    recovery = read_recovery(recover, gradual, recover_config, recover_sets)
    options = {
        "method": method, "score": score, "arm": arm, "calibration.source": calibration, "model.device": device,
        "model.dtype": dtype, "model.mask_id": mask_id, "model.block_size": block_size,
        "model.allow_pickle": allow_pickle or None, "reconstruct.enabled": False if no_refit else None,
    }  # fmt: skip
    ratios = read_ratios(ratio)
    settings = read_config(config, ratios[0] if ratios else None, sets, nm, options, target_latency)
    if plan is not None:
        keys = [*(sets or []), *["structured.score"] * bool(score or arm)]
        _check_beside_plan(settings.method, ratio, keys, target_latency, levels, dry_run)
    _check_options(settings, ratio, sets, levels)
    check_alone(work, resume, recovery is not None)
    if recovery is not None:
        schedule = make_schedule(settings, recovery, ratios, gradual, plan, levels)
        show_schedule((checkpoint, out, schedule, overwrite), dry_run)
        return
    _start((checkpoint, _outputs(out, ratios), settings, overwrite), plan, work_of(out, work, levels, resume), dry_run)


def _outputs(out: Path, ratios: list[float]) -> dict[float | None, Path]:
    """Ratio (None: what the configuration says) -> the directory to write."""
    return {each: out / f"ratio-{each}" for each in ratios} if len(ratios) > 1 else {None: out}


def _check_options(config: "Config", ratio: str | None, sets: list[str] | None, levels: Path | None) -> None:
    """Raise UserError for options that have no effect on this run."""
    if levels is not None and not config.search.enabled:
        raise UserError(f"--levels {levels} is for a search: add --set search.enabled=true, or leave it out")
    if idle := [key for key in OF_TEXT if key in set_keys(sets) and config.calibration.replays]:
        raise UserError(f"{idle[0]} has no effect on a saved calibration, which is replayed as it is: leave it out")
    if len(read_ratios(ratio)) > 1 and config.method != "structured":
        raise UserError(f"--ratio {ratio} has several ratios: with --method {config.method} give one at a time")


def _check_beside_plan(
    method: str,
    ratio: str | None,
    sets: list[str] | None,
    target_latency: float | None,
    levels: Path | None,
    dry_run: bool,
) -> None:
    """Raise UserError for options that --plan leaves nothing to do."""
    if method != "structured":
        raise UserError(f"--plan removes heads and channels: leave it out, or --method {method}")
    if target_latency is not None:
        raise UserError(f"--plan already says what is removed: leave out --target-latency {target_latency:g}")
    if ratio is not None or any(text.startswith("structured.") for text in sets or []):
        raise UserError("--plan already says what is removed: leave out --ratio, --score, --arm and --set structured.*")
    if levels is not None:
        raise UserError(f"--plan already says what is removed: leave out --levels {levels}")
    if dry_run:
        raise UserError("--dry-run counts what a ratio removes, not what a plan does: leave out one of them")


def _start(request: "Request", plan: Path | None, work: "Work", dry_run: bool) -> None:
    """Do, or say, what is asked for."""
    from dataclasses import replace

    from structprune.cli.work import stoppable
    from structprune.workers import workers

    with workers(reduces=True) as place:
        work = replace(work, workers=place)
        if dry_run:
            show_dry_run(request, work)
            return
        with stoppable(work, request[1].values()) as work:
            _run(request, plan, work)


def _run(request: "Request", plan: Path | None, work: "Work") -> None:
    """Prune by a plan, prune, or mask."""
    if plan is not None:
        _apply_plan(request, plan, work)
    elif request[2].method == "structured":
        _prune(request, work)
    else:
        _make_masks(request, work)


def _prune(request: "Request", work: "Work") -> None:
    """Prune at one or several ratios, and show at the end what was written, also after a failure."""
    from structprune.cli.console import progress_of, show
    from structprune.runs.checkpoints import prune_at_ratios

    lines: list = []
    try:
        with progress_of(work.workers) as track:
            for written in prune_at_ratios(*request, track, work=work):
                lines += closing(written.result.report, written.directory, written.source_bytes)
                del written  # its model
            if not lines:
                lines = [f"{out} is of an earlier run with the same request" for out in request[1].values()]
    finally:
        show(*lines, *taken_from(work), shown=work.workers.main)


def _apply_plan(request: "Request", plan_file: Path, work: "Work") -> None:
    """Prune by a plan, and show the result."""
    from structprune.cli.console import progress_of, show
    from structprune.runs.checkpoints import prune_checkpoint
    from structprune.structured.plan import Plan

    plan, (checkpoint, outputs, config, overwrite) = Plan.load(plan_file), request
    with progress_of(work.workers) as track:
        written = prune_checkpoint(checkpoint, outputs[None], config, plan, overwrite, track, work=work)
    lines = closing(written.result.report, written.directory, written.source_bytes)
    show(*lines, *taken_from(work), shown=work.workers.main)


def _make_masks(request: "Request", work: "Work") -> None:
    """Mask, and show the result."""
    from structprune.cli.console import progress_of, show
    from structprune.report.tables import mask_table
    from structprune.runs.checkpoints import mask_checkpoint

    checkpoint, outputs, config, overwrite = request
    out = outputs[None]
    with progress_of(work.workers) as track:
        masked = mask_checkpoint(checkpoint, out, config, overwrite, track, work=work).result
    text = ", calibration.safetensors" if masked.calibration is not None else ""
    show(
        mask_table(masked.report),
        f"Wrote {out} (the checkpoint in its own layout, masks.safetensors, report.json, README.md{text})",
        "The file is not smaller and not faster by itself: zeros pay off with 2:4 kernels on a GPU. For a smaller dense"
        " model use --method structured.",
        *taken_from(work),
        shown=work.workers.main,
    )
