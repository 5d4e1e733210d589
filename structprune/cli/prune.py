"""`structprune prune` and `structprune inspect`, which take the same settings."""

from pathlib import Path
from typing import Annotated

import typer

from structprune.cli.options import (
    CalibrationText,
    Checkpoint,
    ConfigFile,
    Debug,
    Device,
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

OF_TEXT = [f"calibration.{key}" for key in ("windows", "length", "steps", "interval", "subset", "split", "column")]
PRUNE_HELP = """Prune a checkpoint: remove heads and MLP channels, refit what is left, write a smaller dense model.

With --method unstructured or nm: set single weights to zero, in the checkpoint's own layout.

[bold]Examples[/bold]

structprune prune GSAI-ML/LLaDA-8B-Base --out llada-0.5 --config configs/llada-0.5.yaml

structprune prune ./my-dream --out small --ratio 0.3 --calibration notes.txt --set calibration.length=512

[bold]Keys worth knowing[/bold] (all of them, with defaults: structprune/config/settings.py)

structured.score: obs, wanda, fluctuation, taylor, magnitude

structured.arm (default masked+sink) and reconstruct.arm (default masked): also clean, clean+sink

structured.allocation: global, uniform, depth

structured.split: measured, equal, by-cost, joint, or a number of heads (per block; over all blocks under global)

structured.gqa: query_heads, kv_groups; structured.protect_first, structured.protect_last, structured.round_to

sink.policy (of an arm with +sink): all, unstable, none; sink.trajectory: forward, reverse; sink.scale_free, sink.mask

reconstruct.enabled, reconstruct.target: dense, layer; export.compat: free, uniform, official; memory.budget_gb

[bold]For masks[/bold] (--method unstructured or nm; presets of the published choices: configs/published)

structprune prune GSAI-ML/LLaDA-8B-Base --out llada-2of4 --method nm --nm 2:4

masking.score: sparsegpt, wanda, ria, magnitude, sink-wanda, sink-sparsegpt; masking.arm as above (default masked)

masking.order: sequential, one-shot; masking.allocation: uniform, owl, depth; reconstruct.enabled: refit what stays
"""


def _settings(config: Path | None, ratio: float | None, sets: list[str] | None, nm: str | None = None, **extra):
    """The run's configuration: file, then --set, then the options that have a name of their own."""
    from structprune.config import Config

    named = {key.replace("__", "."): value for key, value in extra.items()} | {"masking.nm": nm and f"'{nm}'"}
    given = [*(sets or []), *(f"{key}={value}" for key, value in named.items() if value is not None)]
    asked = _named(sets)
    if nm is not None and ratio is None and "masking.ratio" not in asked:
        given.append("masking.ratio=null")  # a preset's ratio is of its own pattern
    if ratio is not None:
        key = f"{'structured' if Config.load(config, given).method == 'structured' else 'masking'}.ratio"
        if key in asked:
            raise UserError(f"--ratio {ratio} and --set {key} both name the ratio: leave one out")
        given.append(f"{key}={ratio}")
    settings = Config.load(config, given)
    if nm is not None and settings.method != "nm":
        raise UserError(f"--nm {nm} means nothing with method {settings.method}: add --method nm, or leave it out")
    _check_method(settings.method, asked)
    return settings


def _named(sets: list[str] | None) -> set[str]:
    """The keys that --set names."""
    return {text.partition("=")[0].strip() for text in sets or []}


def _check_method(method: str, asked: set[str]) -> None:
    """Raise UserError for a key of another method: values that happen to be the default go unnoticed elsewhere."""
    structured = method == "structured"
    other = ("masking.",) if structured else ("structured.", "export.")
    idle = sorted(key for key in asked if key.startswith(other) or (key == "masking.nm" and method != "nm"))
    if idle:
        wanted = "nm" if idle[0] == "masking.nm" else "unstructured or nm" if structured else "structured"
        raise UserError(f"--set {idle[0]} means nothing with method {method}: add --method {wanted}, or leave it out")


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
    device: Device = None,
    mask_id: MaskId = None,
    allow_pickle: Pickle = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Only what contradicts itself on the command line is refused here; the rest by the run itself."""
    from structprune.cli.show import mask_and_show, prune_and_show

    extra = {"calibration__source": calibration, "model__device": device, "model__mask_id": mask_id, "method": method}
    settings = _settings(config, ratio, sets, nm, **extra, model__allow_pickle=allow_pickle or None)
    if plan is not None and settings.method != "structured":
        raise UserError(f"--plan removes heads and channels: leave it out, or --method {settings.method}")
    if plan is not None and (ratio is not None or any(text.startswith("structured.") for text in sets or [])):
        raise UserError("--plan says what goes already: leave out --ratio and --set structured.*")
    if idle := [key for key in OF_TEXT if key in _named(sets) and settings.calibration.replays]:
        raise UserError(f"{idle[0]} means nothing for a saved calibration, which is replayed as it is: leave it out")
    if settings.method == "structured":
        prune_and_show(checkpoint, out, settings, plan, overwrite)
    else:
        mask_and_show(checkpoint, out, settings, overwrite)


def inspect(
    checkpoint: Checkpoint,
    method: Method = None,
    config: ConfigFile = None,
    ratio: Ratio = None,
    nm: Pattern = None,
    sets: Sets = None,
    mask_id: MaskId = None,
    allow_pickle: Pickle = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Dry run: units, parameters, bytes and MACs before and after, and predicted peak memory. Reads no weights."""
    from structprune.cli.show import inspect_and_show

    extra = {"model__mask_id": mask_id, "model__allow_pickle": allow_pickle or None, "method": method}
    inspect_and_show(checkpoint, _settings(config, ratio, sets, nm, **extra), json_out)
