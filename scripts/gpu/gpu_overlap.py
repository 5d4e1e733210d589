"""The stage `overlap` of gpu_report: weights with and without memory.overlap compared, and the time of both."""

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from scripts.bench.bench_pruned import run_config
from scripts.gpu.gpu_common import RATIOS, at_volume, calibration_at, checkpoint
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
MAPPED_GB = 1e-3  # a memory budget so small that hidden states are in files and nothing is held
CASES: dict[
    str, tuple[bool, dict[str, Any]]
] = {  # name -> whether weights are masked, and the memory settings beside `overlap`
    "structured": (False, {}),
    "structured, states in files, offload": (False, {"budget_gb": MAPPED_GB, "offload": True}),
    "sparsegpt": (True, {}),
}


def overlap(options: argparse.Namespace, track) -> dict:
    """Small runs on the first blocks, with and without memory.overlap.

    Returns:
        For each case the seconds of both and the comparison of their weights; or why nothing could be compared.
    """
    device = pick_device(options.device)
    volume = VOLUME | {"levels": min(VOLUME["levels"], options.levels), "window": options.window}
    runs: list[dict] = []
    result = {"blocks": BLOCKS, "volume": volume | {"held_out": options.held_out}, "runs": runs}
    if lane_to(device) is None:
        reason = "is for accelerators, not for" if device.type == "cpu" else "finds no pinned memory for copies on"
        return result | {"refused": f"memory.overlap {reason} {device}"}
    small = first_blocks(load_model(checkpoint(options, "dense"), options.dtype, device), BLOCKS)
    for case in track(CASES, "memory.overlap"):
        runs.append({"case": case, **_run_case(small, options, volume, case)})
    return result | {"refused": None}


def _run_case(model: DiffusionLM, options: argparse.Namespace, volume: dict, case: str) -> dict:
    """One case without and with overlap, after a short warm-up run of both."""
    if CASES[case][1].get("offload"):
        model = copy.deepcopy(model).cpu()
    weights, seconds = {}, {}

    def run(at: dict, on: bool) -> None:
        calibration = calibration_at(model, options, at, options.held_out)
        weights[on] = prune(model, _config(options, at, case, on), calibration).model.state_dict()

    for at in (volume | {"window": min(volume["window"], SHORT)}, volume):
        for on in (False, True):
            seconds[on] = elapsed(partial(run, at, on), pick_device(options.device))
    return {"seconds": {"off": seconds[False], "on": seconds[True]}, **compare(weights[False], weights[True])}


def _config(options: argparse.Namespace, volume: dict, case: str, on: bool) -> Config:
    masks, memory = CASES[case]
    at = at_volume(options, volume, options.held_out)
    config = mask_config(options, volume, options.held_out) if masks else run_config(at, RATIOS[1])
    settings = {"memory": MemorySettings(overlap=on, **memory), "model": ModelSettings(device=options.device)}
    return config.model_copy(update=settings)


def compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict:
    """Whether two models' tensors are bit-equal, and their largest difference (None if shapes differ)."""
    same = one.keys() == other.keys() and all(one[name].shape == other[name].shape for name in one)
    equal = same and all(torch.equal(one[name], other[name]) for name in one)
    return {"equal": equal, "largest_difference": max(_differences(one, other)) if same else None}


def _differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Iterator[float]:
    for name, value in one.items():
        gap = (value.double() - other[name].double()).abs()
        yield float(gap.nan_to_num(nan=torch.finfo(torch.float64).max).max())  # JSON has no NaN


def overlap_lines(result: dict) -> list[str]:
    """The lines to print after the stage."""
    if result["refused"]:
        return [f"  nothing compared: {result['refused']}"]
    lines = []
    for run in result["runs"]:
        verdict = "weights bit-equal" if run["equal"] else f"WEIGHTS DIFFER (largest: {run['largest_difference']})"
        off, on = (run["seconds"][side] for side in ("off", "on"))
        lines.append(f"  {run['case']}: {verdict}, {off:.1f} s without, {on:.1f} s with")
    return lines
