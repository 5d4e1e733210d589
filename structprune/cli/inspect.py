"""`structprune inspect`."""

import json
from typing import Annotated

import typer

from structprune.cli.configuration import read_config, read_ratio
from structprune.cli.options import (
    Arm,
    BlockSize,
    Checkpoint,
    ConfigFile,
    Debug,
    MaskId,
    Method,
    NoRefit,
    Pattern,
    Pickle,
    Ratio,
    Score,
    Sets,
    TargetLatency,
)


def inspect(
    checkpoint: Checkpoint,
    method: Method = None,
    config: ConfigFile = None,
    ratio: Ratio = None,
    target_latency: TargetLatency = None,
    nm: Pattern = None,
    score: Score = None,
    arm: Arm = None,
    no_refit: NoRefit = False,
    sets: Sets = None,
    mask_id: MaskId = None,
    block_size: BlockSize = None,
    allow_pickle: Pickle = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Dry run: units, parameters, bytes and MACs before and after, and predicted peak memory. Reads no weights."""
    from structprune.cli.console import show
    from structprune.report.tables import inspect_tables, mask_inspect_tables
    from structprune.runs.inspect import inspect_checkpoint, inspect_masking

    options = {
        "model.mask_id": mask_id,
        "model.block_size": block_size,
        "model.allow_pickle": allow_pickle or None,
        "method": method,
    }
    options |= {"score": score, "arm": arm, "reconstruct.enabled": False if no_refit else None}
    settings = read_config(config, read_ratio(ratio), sets, nm, options, target_latency)
    structured = settings.method == "structured"
    result = inspect_checkpoint(checkpoint, settings) if structured else inspect_masking(checkpoint, settings)
    tables = inspect_tables if structured else mask_inspect_tables
    if json_out:
        print(json.dumps(result, indent=2))
    else:
        show(*tables(result), "Read: config.json and safetensors headers only. Nothing was written.")
