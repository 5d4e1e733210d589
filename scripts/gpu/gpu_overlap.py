"""The stage of gpu_report that checks memory.overlap: the same weights with it and without, and the time of either."""

import argparse
import copy
from collections.abc import Iterator

import torch

from scripts.bench.bench_pruned import run_config
from scripts.gpu.gpu_common import RATIOS, at_volume, calibration_at, made
from scripts.gpu.gpu_masks import mask_config
from scripts.gpu.gpu_volume import SHORT, first_blocks
from structprune.bench.latency import elapsed
from structprune.config import Config, MemorySettings, ModelSettings
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device
from structprune.models.transfer import lane_to
from structprune.runs.prune import prune

BLOCKS = 2
VOLUME = {"windows": 3, "levels": 2}
MAPPED_GB = 1e-3  # a budget beyond which hidden states are in files and nothing is held
CASES = {  # name -> whether weights are masked, and the memory settings beside `overlap`
    "structured": (False, {}),
    "structured, states in files, offload": (False, {"budget_gb": MAPPED_GB, "offload": True}),
    "sparsegpt": (True, {}),
}


def overlap(options: argparse.Namespace, track) -> dict:
    """Small runs on the first blocks, with memory.overlap and without.

    Returns:
        By case the seconds of either and how their weights compare; or why nothing could be compared.
    """
    device = pick_device(options.device)
    volume = VOLUME | {"levels": min(VOLUME["levels"], options.levels), "window": options.window}
    about = {"blocks": BLOCKS, "volume": volume | {"held_out": options.held_out}, "runs": []}
    if lane_to(device) is None:
        why = (
            "is for accelerators, not for" if device.type == "cpu" else "finds no pinned memory that carries copies on"
        )
        return about | {"refused": f"memory.overlap {why} {device}"}
    small = first_blocks(load_model(made(options, "dense"), options.dtype, device), BLOCKS)
    for case in track(CASES, "memory.overlap"):
        about["runs"].append({"case": case, **_compared(small, options, volume, case)})
    return about | {"refused": None}


def _compared(model: DiffusionLM, options: argparse.Namespace, volume: dict, case: str) -> dict:
    """One case, run without and with, after a short run of either that loads what is loaded once."""
    model = copy.deepcopy(model).to("cpu") if CASES[case][1].get("offload") else model
    made, seconds = {}, {}

    def run(at: dict, on: bool) -> None:
        calibration = calibration_at(model, options, at, options.held_out)
        made[on] = prune(model, _config(options, at, case, on), calibration).model.state_dict()

    for at in (volume | {"window": min(volume["window"], SHORT)}, volume):
        for on in (False, True):
            seconds[on] = elapsed(lambda: run(at, on), pick_device(options.device))  # noqa: B023
    return {"seconds": {"off": seconds[False], "on": seconds[True]}, **compare(made[False], made[True])}


def _config(options: argparse.Namespace, volume: dict, case: str, on: bool) -> Config:
    masks, memory = CASES[case]
    at = at_volume(options, volume, options.held_out)
    config = mask_config(options, volume, options.held_out) if masks else run_config(at, RATIOS[1])
    settings = {"memory": MemorySettings(overlap=on, **memory), "model": ModelSettings(device=options.device)}
    return config.model_copy(update=settings)


def compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict:
    """Whether two models' tensors are the same bit by bit, and their largest difference (None: of other shapes)."""
    same = one.keys() == other.keys() and all(one[name].shape == other[name].shape for name in one)
    equal = same and all(torch.equal(one[name], other[name]) for name in one)
    return {"equal": equal, "largest_difference": max(_differences(one, other)) if same else None}


def _differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Iterator[float]:
    for name, value in one.items():
        gap = (value.double() - other[name].double()).abs()
        yield float(gap.nan_to_num(nan=torch.finfo(torch.float64).max).max())  # as JSON has it


def overlap_lines(found: dict) -> list[str]:
    """What is said of the stage at once."""
    if found["refused"]:
        return [f"  nothing compared: {found['refused']}"]
    lines = []
    for run in found["runs"]:
        said = "weights bit-equal" if run["equal"] else f"WEIGHTS DIFFER (largest: {run['largest_difference']})"
        times = (run["seconds"][side] for side in ("off", "on"))
        lines.append("  {}: {}, {:.1f} s without, {:.1f} s with".format(run["case"], said, *times))
    return lines
