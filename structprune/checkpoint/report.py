"""report.json: figures of a structured run, and of one that made masks, as plain data."""

import math
import platform
from dataclasses import asdict

import torch
import transformers

from structprune import __version__
from structprune.bench.memory import peak_memory_bytes
from structprune.calibration.batches import Calibration
from structprune.checkpoint.export import export_class
from structprune.checkpoint.licence import source_licence
from structprune.config import Config
from structprune.masking.masks import Masks
from structprune.models.adapter import Adapter
from structprune.models.modeling_structprune import DiffusionLM
from structprune.structured.scores.table import resolve_arm
from structprune.structured.sizes import block_size, forward_macs


def build_report(
    dense: DiffusionLM,
    small: DiffusionLM,
    config: Config,
    calibration: Calibration,
    seconds: dict[str, float],
    device: torch.device,
) -> dict:
    """Sizes before and after, what the run was asked for and calibrated on, versions, timings, peak memory, class.

    Args:
        seconds: phase -> seconds it took.
        device: where forward passes computed.
    """
    before, after = Adapter(dense), Adapter(small)
    blocks = [sum(block_size(block, "query_heads").total for block in side.blocks) for side in (before, after)]
    length = calibration.length
    return _run(dense, config, calibration, seconds, device) | {
        "arm": resolve_arm(config.structured.score, config.structured.arm),
        "ratio": removed_ratio(before, after, config),
        "parameters": {"before": dense.num_parameters(), "after": small.num_parameters()},
        "block_parameters": {"before": blocks[0], "after": blocks[1]},
        "macs": {"before": forward_macs(before, length), "after": forward_macs(after, length), "tokens": length},
        "widths": [asdict(block.widths) for block in after.blocks],
        "export_class": export_class(small.config, dense.source.values),
    }


def mask_report(
    model: DiffusionLM,
    masks: Masks,
    config: Config,
    calibration: Calibration | None,
    seconds: dict[str, float],
    device: torch.device,
) -> dict:
    """Zeros of every projection and in total (`masked`: what this run removed), what the run was asked for and looked
    at, timings, peak memory.

    Args:
        calibration: None where nothing of the run looked at text.
        seconds, device: as `build_report`.
    """
    projections = sum(rows * columns for rows, columns in masks.shapes.values())
    weights = model.state_dict()
    zeros = {name: int((weights[name] == 0).sum()) for name in masks.shapes}
    return _run(model, config, calibration, seconds, device) | {
        "sparsity": {
            "total": sum(zeros.values()) / projections,
            "masked": masks.sparsity(),
            "tensors": {name: count / math.prod(masks.shapes[name]) for name, count in zeros.items()},
        },
        "parameters": {
            "all": model.num_parameters(),
            "projections": projections,
            "zero": sum(zeros.values()),
        },
    }


def _run(
    model: DiffusionLM,
    config: Config,
    calibration: Calibration | None,
    seconds: dict[str, float],
    device: torch.device,
) -> dict:
    """What holds for every run: source and its licence, choices, text, timings, memory, versions."""
    text = None
    if calibration is not None:
        text = calibration.metadata | {"windows": calibration.windows, "length": calibration.length}
    return {
        "source": model.source.name,
        "license": source_licence(model.source.directory),
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
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def removed_ratio(before: Adapter, after: Adapter, config: Config) -> float:
    """Removed share of the seven projections' parameters over unprotected blocks; biases that a refit added count."""
    first, last = config.structured.protect_first, len(before.blocks) - config.structured.protect_last
    totals = [
        sum(block_size(block, "query_heads").total for block in side.blocks[first:last]) for side in (before, after)
    ]
    return 1 - totals[1] / totals[0]
