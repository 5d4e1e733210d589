"""The dry run of masks: how many weights would become zero, and what the run would need, without reading a weight."""

from pathlib import Path

from structprune.bench.mask_memory import predicted_mask_peak
from structprune.calibration.build import check_length
from structprune.config import Config
from structprune.models.adapter import Adapter
from structprune.refit.masked import STEPS
from structprune.runs.ghost import read_ghost
from structprune.runs.resolve import resolve_masking


def inspect_masking(source: str | Path, config: Config) -> dict:
    """Zeros per kind of projection and predicted peak memory of an unstructured or N:M run; no weight is read.

    `owl` decides at run time how the ratio is spread over blocks; shown is the total.

    Returns:
        Plain data, as `report.tables.mask_inspect_tables` shows it.
    Raises:
        UserError: a checkpoint or configuration that the run would refuse too.
    """
    ghost = read_ghost(source, config.model)
    model, adapter = ghost.model, ghost.adapter
    request = resolve_masking(config, model, dry_run=True)
    if request.reads_text:
        check_length(model, config)
    settings = request.settings
    kinds = {role: sum(block[role].weight.numel() for block in adapter.blocks) for role in adapter.blocks[0].names}
    zeros = {role: {"weights": count, "zero": round(count * request.ratio)} for role, count in kinds.items()}
    return {
        "source": ghost.name,
        "family": adapter.family.name,
        "method": config.method,
        "score": request.name,
        "arm": request.arm,
        "ratio": request.ratio,
        "pattern": settings.nm if request.nm else None,
        "rest": f", {settings.order}" * (request.arm is not None) + f", {settings.allocation} allocation",
        "refit_operations": refit_operations(adapter) if request.reconstruct.enabled else 0,
        "parameters": model.num_parameters(),
        "projections": zeros,
        "stored_dtype": str(ghost.stored).removeprefix("torch."),
        "bytes": ghost.stored_bytes,
        "mask_bytes": sum(kinds.values()) // 8,
        "memory": predicted_mask_peak(adapter, request, ghost.stored),
    }


def refit_operations(adapter: Adapter) -> float:
    """Most floating-point operations of a refit under masks: `STEPS` products of every matrix with a Gram matrix."""
    shapes = [block[role].weight.shape for block in adapter.blocks for role in block.names]
    return sum(2.0 * STEPS * rows * columns**2 for rows, columns in shapes)
