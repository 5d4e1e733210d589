"""The stage `sparsegpt` of gpu_report: ours against a plain implementation, timed in one run."""

import argparse

import torch

from scripts.bench.bench_pruned import STEPS
from scripts.bench.sparsegpt_plain import Phases, prune_plainly
from scripts.gpu.gpu_common import calibration_at, checkpoint
from scripts.gpu.gpu_volume import choose_volume, describe_volume, first_blocks
from structprune.config import Config
from structprune.masking.masks import unpack_bits
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device
from structprune.progress import untracked
from structprune.runs.mask import Masked, mask

RATIO = 0.5
GOAL = 3.0  # times faster than the plain implementation


def sparsegpt(options: argparse.Namespace, track) -> dict:
    """Time of both by phase, and the agreement of their masks; on the first `--blocks` blocks, or on all."""
    device = pick_device(options.device)
    whole = load_model(checkpoint(options, "dense"), options.dtype, device)
    depth = len(Adapter(whole).blocks)
    count = min(options.blocks or depth, depth)

    def work(part: DiffusionLM, volume: dict) -> None:
        _ours(part, options, volume)
        prune_plainly(_separate(part), _copies(part, options, volume), RATIO)

    volume, choice = choose_volume(work, whole, options, options.sparsegpt_seconds, 0, count)
    model, clock = first_blocks(whole, count), Phases(device)
    ids, plain = _copies(model, options, volume), _separate(model)  # (R, T)
    with clock.timed("ours"):
        ours = _ours(model, options, volume, track)
    with clock.timed("plain"):
        masks, phases = prune_plainly(plain, ids, RATIO, track)
    seconds = clock.seconds
    return {
        "ratio": RATIO,
        "arm": ours.report["arm"],
        "blocks": count,
        "of_blocks": depth,
        "seconds": seconds,
        "times_faster": seconds["plain"] / seconds["ours"],
        "wanted": GOAL,
        "phases": {"ours": ours.report["seconds"], "plain": phases},
        "agreement": agreement(ours, plain, masks),
        "calibration": describe_volume(volume, 0, choice, sum(seconds.values()), count),
    }


def mask_config(options: argparse.Namespace, volume: dict, held_out: int) -> Config:
    """SparseGPT on the default arm at a calibration volume, without a refit."""
    return Config.load(
        overrides={
            "method": "unstructured", "masking.score": "sparsegpt", "masking.ratio": RATIO,
            "reconstruct.enabled": False, "calibration.held_out": held_out, "calibration.windows": volume["windows"],
            "calibration.length": volume["window"], "calibration.interval": STEPS // volume["levels"],
        }
    )  # fmt: skip


def _ours(model: DiffusionLM, options: argparse.Namespace, volume: dict, track=untracked) -> Masked:
    return mask(model, mask_config(options, volume, 0), calibration_at(model, options, volume, 0), track)


def _copies(model: DiffusionLM, options: argparse.Namespace, volume: dict) -> torch.Tensor:
    """The noisy copies that both use, (R, T)."""
    return calibration_at(model, options, volume, 0).noisy_ids.flatten(0, 1)


def _separate(model: DiffusionLM) -> DiffusionLM:
    """A model whose projections can be replaced; tensors that are not replaced are shared."""
    return first_blocks(model, len(Adapter(model).blocks))


@torch.no_grad()
def agreement(ours: Masked, plain: DiffusionLM, masks: dict[str, torch.Tensor]) -> dict:
    """Share of equal mask entries in all blocks and in the first, and the relative difference of weights in the first.

    Args:
        plain: the other model. masks: its masks, weight's name -> (O, C) bool.
    """
    equal, total = {}, {}
    for name, other_mask in masks.items():  # (O, C)
        equal[name] = int((unpack_bits(ours.masks.packed[name], other_mask.shape[1]) == other_mask).sum())
        total[name] = other_mask.numel()
    first = sorted(f"{name}.weight" for name in Adapter(plain).blocks[0].names.values())
    difference = norm = 0.0  # squared
    for name in first:
        weight, other = ours.model.get_parameter(name).float(), plain.get_parameter(name).float()  # (O, C) each
        difference += float((weight - other).square().sum())
        norm += float(other.square().sum())
    return {
        "masks": sum(equal.values()) / sum(total.values()),
        "masks_of_first_block": sum(equal[name] for name in first) / sum(total[name] for name in first),
        "weights_of_first_block": (difference / norm) ** 0.5,
    }
