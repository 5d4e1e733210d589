"""What the stages of gpu_report share: shapes, checkpoints in the work directory, calibration at a volume."""

import argparse
from pathlib import Path

from scripts.bench.bench_pruned import random_calibration
from scripts.bench.measure_inspect import SHAPES
from scripts.tools.random_checkpoint import LLaDAShape, llada_values
from structprune.calibration.batches import Calibration
from structprune.errors import UserError
from structprune.models.families import FAMILIES, Family
from structprune.models.modeling_structprune import DiffusionLM

PUBLISHED = {"llada-8b": SHAPES["LLaDA-8B"], "dream-7b": SHAPES["Dream-7B"]}
TINY = llada_values(LLaDAShape(64, 4, 2, 128, 256, 128), "float32")
RATIOS = (0.3, 0.5)


def shape_values(options: argparse.Namespace) -> dict:
    """config.json of the shape in the options."""
    return TINY if options.shape == "tiny" else PUBLISHED[options.shape]


def shape_family(values: dict) -> Family:
    return next(each for each in FAMILIES if values["model_type"] in each.model_types)


def checkpoint(options: argparse.Namespace, name: str) -> Path:
    """A checkpoint of an earlier stage.

    Raises:
        UserError: it does not exist.
    """
    path = options.work / name
    if not path.exists():
        raise UserError(f"'{path}' does not exist: run --stages make,prune first, with the same --work")
    return path


def pruned_name(ratio: float) -> str:
    return f"pruned-{ratio}"


def at_volume(options: argparse.Namespace, volume: dict, held_out: int) -> argparse.Namespace:
    """The options with the windows, levels and window of a volume."""
    return argparse.Namespace(**vars(options) | volume | {"held_out": held_out})


def calibration_at(model: DiffusionLM, options: argparse.Namespace, volume: dict, held_out: int) -> Calibration:
    """Random ids under the family's noise, at a volume."""
    return random_calibration(model, at_volume(options, volume, held_out))
