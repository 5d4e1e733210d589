"""`structprune prune`."""

from pathlib import Path
from typing import TYPE_CHECKING

from structprune.cli.configuration import read_config, set_keys
from structprune.cli.options import (
    CalibrationText,
    Checkpoint,
    ConfigFile,
    Debug,
    Device,
    Levels,
    MaskId,
    Method,
    Out,
    Overwrite,
    Pattern,
    Pickle,
    PlanFile,
    Ratio,
    Sets,
)
from structprune.errors import UserError

if TYPE_CHECKING:
    from structprune.config import Config

OF_TEXT = [
    f"calibration.{key}" for key in ("windows", "length", "steps", "interval", "copies", "subset", "split", "column")
]


def prune(
    checkpoint: Checkpoint,
    out: Out,
    method: Method = None,
    config: ConfigFile = None,
    ratio: Ratio = None,
    nm: Pattern = None,
    sets: Sets = None,
    calibration: CalibrationText = None,
    plan: PlanFile = None,
    levels: Levels = None,
    device: Device = None,
    mask_id: MaskId = None,
    allow_pickle: Pickle = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Refuses only contradictions on the command line itself; the run refuses the rest."""
    options = {
        "calibration.source": calibration,
        "model.device": device,
        "model.mask_id": mask_id,
        "method": method,
        "model.allow_pickle": allow_pickle or None,
    }
    settings = read_config(config, ratio, sets, nm, options)
    if plan is not None and settings.method != "structured":
        raise UserError(f"--plan removes heads and channels: leave it out, or --method {settings.method}")
    if plan is not None and (ratio is not None or any(text.startswith("structured.") for text in sets or [])):
        raise UserError("--plan already says what is removed: leave out --ratio and --set structured.*")
    if levels is not None and not settings.search.enabled:
        raise UserError(f"--levels {levels} is for a search: add --set search.enabled=true, or leave it out")
    if idle := [key for key in OF_TEXT if key in set_keys(sets) and settings.calibration.replays]:
        raise UserError(f"{idle[0]} has no effect on a saved calibration, which is replayed as it is: leave it out")
    if settings.method == "structured":
        _prune_structured(checkpoint, out, settings, (plan, levels), overwrite)
    else:
        _make_masks(checkpoint, out, settings, overwrite)


def _prune_structured(
    checkpoint: str, out: Path, config: "Config", files: tuple[Path | None, Path | None], overwrite: bool
) -> None:
    """Prune, and show the result.

    Args:
        files: a plan to apply, and the directory of levels.
    """
    from structprune.cli.console import progress_bars, show
    from structprune.report.tables import run_table
    from structprune.runs.checkpoints import prune_checkpoint
    from structprune.structured.plan import Plan

    plan_file, levels = files
    plan = None if plan_file is None else Plan.load(plan_file)
    with progress_bars() as track:
        written = prune_checkpoint(checkpoint, out, config, plan, overwrite, track, levels=levels)
    after = sum(path.stat().st_size for path in out.glob("*.safetensors") if path.name != "calibration.safetensors")
    show(
        run_table(written.result.report, (written.source_bytes, after)),
        f"Wrote {out} (model, plan.json, calibration.safetensors, report.json, README.md)",
        f"Load it anywhere: AutoModelForCausalLM.from_pretrained('{out}', trust_remote_code=True)",
    )


def _make_masks(checkpoint: str, out: Path, config: "Config", overwrite: bool) -> None:
    """Mask, and show the result."""
    from structprune.cli.console import progress_bars, show
    from structprune.report.tables import mask_table
    from structprune.runs.checkpoints import mask_checkpoint

    with progress_bars() as track:
        masked = mask_checkpoint(checkpoint, out, config, overwrite, track).result
    text = ", calibration.safetensors" if masked.calibration is not None else ""
    show(
        mask_table(masked.report),
        f"Wrote {out} (the checkpoint in its own layout, masks.safetensors, report.json, README.md{text})",
        "The file is not smaller and not faster by itself: zeros pay off with 2:4 kernels on a GPU. For a smaller dense"
        " model use --method structured.",
    )
