"""The stage of gpu_report that prunes: whole structured runs, their time, share of forward passes and memory."""

import argparse
import time

import torch

from scripts.bench.bench_pruned import run_config, run_figures
from scripts.bench.forward_clock import ForwardClock
from scripts.gpu.gpu_common import RATIOS, at_volume, calibration_at, made, pruned_name
from scripts.gpu.gpu_volume import choose_volume, describe_volume
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device, synchronise
from structprune.progress import untracked
from structprune.runs.prune import Pruned, Pruner

WANTED_ABOVE_WEIGHTS = 8e9  # bytes at batch 1


def prune(options: argparse.Namespace, track) -> dict:
    """Both ratios from one scoring, at as much calibration as the time allows; the results are saved."""
    model = load_model(made(options, "dense"), options.dtype, pick_device(options.device))
    budget = len(RATIOS) * options.prune_seconds

    def work(part: DiffusionLM, volume: dict) -> None:
        for _ in _runs(part, options, volume, untracked):
            pass

    volume, how = choose_volume(work, model, options, budget, options.held_out, len(model.blocks))
    rows, took = [], 0.0
    for pruned, row in _runs(model, options, volume, track):
        took += row["seconds"]
        start = time.perf_counter()
        pruned.save(options.work / pruned_name(row["asked"]), overwrite=True)
        rows.append(row | {"save_seconds": time.perf_counter() - start})
        del pruned
    calibration = describe_volume(volume, options.held_out, how, took, len(model.blocks)) | {"split": options.split}
    return {"calibration": calibration, "runs": rows}


def _runs(model: DiffusionLM, options: argparse.Namespace, volume: dict, track):
    """Yields what a run at every ratio made, and its figures; the first pays for the scores that all share."""
    device, held_out = model.device, options.held_out
    calibration = calibration_at(model, options, volume, held_out)
    config = run_config(at_volume(options, volume, held_out), RATIOS[0])
    pruner, shared = Pruner(model, config, calibration, track), 0.0
    for ratio in RATIOS:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        clock, start = ForwardClock(device), time.perf_counter()
        with clock.running():
            pruned = pruner.prune(ratio)
        synchronise(device)
        row = run_figures(pruned, ratio, time.perf_counter() - start, clock)
        # of a run on its own, but for the dense model's check: the scores of all are those of the first
        row |= {"whole_seconds": row["seconds"] + shared, "memory": _memory(model, pruned, device)}
        shared = shared or row["phases"]["scores"]
        yield pruned, row
        del pruned  # its weights are no part of the next run's peak


def _memory(model: DiffusionLM, pruned: Pruned, device: torch.device) -> dict:
    """Peak bytes of a run and of the weights it holds: dense ones, and pruned ones that are no part of them."""
    dense = {weight.data_ptr(): weight.nbytes for weight in model.parameters()}
    own = {weight.data_ptr(): weight.nbytes for weight in pruned.model.parameters()}
    weights = {"dense": sum(dense.values()), "pruned": sum(own[place] for place in own.keys() - dense.keys())}
    found = {"batch": 1, "weights_bytes": weights, "wanted_above_weights": WANTED_ABOVE_WEIGHTS}
    found["host_peak_bytes"] = pruned.report["peak_memory_bytes"]["host"]
    if device.type != "cuda":
        return found | {"device_peak_bytes": None, "above_weights": None, "above_dense": None}
    peak = torch.cuda.max_memory_allocated(device)
    above = {"above_weights": peak - sum(weights.values()), "above_dense": peak - weights["dense"]}
    return found | {"device_peak_bytes": peak} | above
