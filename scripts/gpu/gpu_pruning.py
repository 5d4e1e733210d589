"""The stage `prune` of gpu_report: whole structured runs, their time, share of forward passes and memory."""

import argparse
import time

import torch

from scripts.bench.bench_pruned import run_config, run_figures
from scripts.bench.forward_clock import ForwardClock
from scripts.gpu.gpu_common import RATIOS, at_volume, calibration_at, checkpoint, pruned_name
from scripts.gpu.gpu_volume import choose_volume, describe_volume
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device, synchronise
from structprune.progress import untracked
from structprune.runs.pruned import Pruned
from structprune.runs.pruner import Pruner

ABOVE_WEIGHTS_GOAL = 8e9  # at most so many bytes, at batch 1


def prune(options: argparse.Namespace, track) -> dict:
    """Prune at both ratios from one scoring, with as much calibration as the time allows, and save the results."""
    model = load_model(checkpoint(options, "dense"), options.dtype, pick_device(options.device))
    budget = len(RATIOS) * options.prune_seconds

    def work(part: DiffusionLM, volume: dict) -> None:
        for _ in _runs(part, options, volume, untracked):
            pass

    depth = len(Adapter(model).blocks)
    volume, choice = choose_volume(work, model, options, budget, options.held_out, depth)
    rows, seconds = [], 0.0
    for pruned, row in _runs(model, options, volume, track):
        seconds += row["seconds"]
        start = time.perf_counter()
        pruned.save(options.work / pruned_name(row["asked"]), overwrite=True)
        rows.append(row | {"save_seconds": time.perf_counter() - start})
        del pruned
    calibration = describe_volume(volume, options.held_out, choice, seconds, depth) | {"split": options.split}
    return {"calibration": calibration, "runs": rows}


def _runs(model: DiffusionLM, options: argparse.Namespace, volume: dict, track):
    """Yields the pruned model and the figures for every ratio; the first includes the time of the shared scores."""
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
        # time of a separate run, without the dense model's check: every run would need the scores of the first
        row |= {"whole_seconds": row["seconds"] + shared, "memory": _memory(model, pruned, device)}
        shared = shared or row["phases"]["scores"]
        yield pruned, row
        del pruned  # else its weights would count in the next run's peak


def _memory(model: DiffusionLM, pruned: Pruned, device: torch.device) -> dict:
    """Peak bytes of a run, and bytes of the dense weights and of pruned weights that do not share memory with them."""
    dense = {weight.data_ptr(): weight.nbytes for weight in model.parameters()}
    own = {weight.data_ptr(): weight.nbytes for weight in pruned.model.parameters()}
    weights = {"dense": sum(dense.values()), "pruned": sum(own[place] for place in own.keys() - dense.keys())}
    memory = {"batch": 1, "weights_bytes": weights, "wanted_above_weights": ABOVE_WEIGHTS_GOAL}
    memory["host_peak_bytes"] = pruned.report["peak_memory_bytes"]["host"]
    if device.type != "cuda":
        return memory | {"device_peak_bytes": None, "above_weights": None, "above_dense": None}
    peak = torch.cuda.max_memory_allocated(device)
    above = {"above_weights": peak - sum(weights.values()), "above_dense": peak - weights["dense"]}
    return memory | {"device_peak_bytes": peak} | above
