"""The contents of report.json, for structured runs and for masking runs, as plain data."""

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict

import torch
import transformers

from structprune import __version__
from structprune.bench.memory import peak_memory_bytes
from structprune.calibration.batches import Calibration
from structprune.checkpoint.export import export_class, own_code
from structprune.checkpoint.licence import source_licence
from structprune.checkpoint.lineage import earlier_steps, removed_in_all
from structprune.config import Config
from structprune.masking.masks import Masks
from structprune.models.adapter import UNIT_KINDS, Adapter, BlockView
from structprune.models.loading import source_of
from structprune.models.maps import give_back
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_dtype
from structprune.structured.scores.table import resolve_arm
from structprune.structured.sizes import block_size, forward_macs


def run_report(
    model: DiffusionLM,
    config: Config,
    calibration: Calibration | None,
    seconds: dict[str, float],
    device: torch.device,
) -> dict:
    """What every run reports: source and its licence, configuration, calibration, timings, peak memory, versions.

    Args:
        calibration: None if the run read no text.
        seconds: phase -> seconds.
        device: where forward passes ran.
    """
    source = source_of(model)
    text = None
    if calibration is not None:
        text = calibration.metadata | {"windows": calibration.windows, "length": calibration.length}
    return {
        "source": source.name,
        "lineage": earlier_steps(source.directory),
        "license": source_licence(source.directory),
        "family": Adapter(model).family.name,
        "config": config.model_dump(mode="json"),
        "calibration": text,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": {
            "structprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": str(device),
        "dtype": str(compute_dtype(model)).removeprefix("torch."),
    }


def structured_report(
    dense: DiffusionLM, small: DiffusionLM, config: Config, length: int, remaining: Sequence[int]
) -> dict:
    """Sizes before and after, arm, export class, and which blocks, attentions and MLPs went as a whole.

    `ratio` is the removed share of the seven projections' parameters in unprotected blocks, counting biases that a
    refit added, and `ratio_of_dense` that share of the model that the lineage began with. Blocks have the dense
    model's indices, except in `widths`, which has a row for every remaining one.

    Args:
        length: T, the tokens that MACs are counted for.
        remaining: the dense model's index of every block of `small` (`Plan.remaining`).
    """
    before, after = Adapter(dense), Adapter(small)
    structured = config.structured
    unprotected = range(structured.protect_first, len(before.blocks) - structured.protect_last)
    open_before = [before.blocks[index] for index in unprotected]
    open_after = [block for index, block in zip(remaining, after.blocks, strict=True) if index in unprotected]
    source = source_of(dense)
    ratio = 1 - _projections(open_after) / _projections(open_before)
    return {
        "arm": resolve_arm(structured.score, structured.arm),
        "ratio": ratio,
        "ratio_of_dense": removed_in_all(earlier_steps(source.directory), ratio),
        "parameters": {"before": dense.num_parameters(), "after": small.num_parameters()},
        "block_parameters": {"before": _projections(before.blocks), "after": _projections(after.blocks)},
        "macs": {"before": forward_macs(before, length), "after": forward_macs(after, length), "tokens": length},
        "widths": [asdict(block.widths) for block in after.blocks],
        "removed": _removed(before, after, remaining),
        "export_class": export_class(small.config, source.values),
        "shifted": small.shifted,
        "own_code": [path.name for path in own_code(source.directory, source.values)]
        if config.export.compat == "official"
        else [],
    }


def _projections(blocks: list[BlockView]) -> int:
    """Parameters of the projections of the blocks."""
    return sum(block_size(block, "query_heads").total for block in blocks)


def _removed(before: Adapter, after: Adapter, remaining: Sequence[int]) -> dict[str, list[int]]:
    """Dense indices of the blocks that are gone, and of the others whose attention or MLP (`channels`) is."""
    pairs = [(before.blocks[index], block) for index, block in zip(remaining, after.blocks)]
    lost = {
        kind: [old.index for old, new in pairs if kind in old.cut_kinds and kind not in new.cut_kinds]
        for kind in UNIT_KINDS
    }
    return {"blocks": [block.index for block in before.blocks if block.index not in remaining]} | lost


def mask_report(model: DiffusionLM, masks: Masks) -> dict:
    """Zeros of every projection and in total; `masked` counts only those made by this run."""
    projections = sum(rows * columns for rows, columns in masks.shapes.values())
    weights, zeros = model.state_dict(), {}
    for name in masks.shapes:
        zeros[name] = int((weights[name] == 0).sum())
        give_back(weights[name])
    total = sum(zeros.values())
    return {
        "sparsity": {
            "total": total / projections,
            "masked": masks.sparsity(),
            "tensors": {name: count / math.prod(masks.shapes[name]) for name, count in zeros.items()},
        },
        "parameters": {"all": model.num_parameters(), "projections": projections, "zero": total},
    }
