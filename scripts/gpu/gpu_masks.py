"""The stage of gpu_report that times SparseGPT: ours against a straightforward implementation, in one run."""

import argparse

import torch

from scripts.bench.bench_pruned import STEPS
from scripts.bench.sparsegpt_plain import Phases, prune_plainly
from scripts.gpu.gpu_common import calibration_at, made
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
WANTED = 3.0  # times faster than the straightforward implementation


def sparsegpt(options: argparse.Namespace, track) -> dict:
    """Time of both, phase by phase, and how far their masks agree; on the first `--blocks` blocks, or on all."""
    device = pick_device(options.device)
    whole = load_model(made(options, "dense"), options.dtype, device)
    count = min(options.blocks or len(whole.blocks), len(whole.blocks))

    def work(part: DiffusionLM, volume: dict) -> None:
        _ours(part, options, volume)
        prune_plainly(_apart(part), _copies(part, options, volume), RATIO)

    volume, how = choose_volume(work, whole, options, options.sparsegpt_seconds, 0, count)
    model, clock = first_blocks(whole, count), Phases(device)
    ids, plain = _copies(model, options, volume), _apart(model)  # (R, T)
    with clock.timed("ours"):
        ours = _ours(model, options, volume, track)
    with clock.timed("plain"):
        masks, phases = prune_plainly(plain, ids, RATIO, track)
    seconds = clock.seconds
    return {
        "ratio": RATIO,
        "arm": ours.report["arm"],
        "blocks": count,
        "of_blocks": len(whole.blocks),
        "seconds": seconds,
        "times_faster": seconds["plain"] / seconds["ours"],
        "wanted": WANTED,
        "phases": {"ours": ours.report["seconds"], "plain": phases},
        "agreement": agreement(ours, plain, masks),
        "calibration": describe_volume(volume, 0, how, sum(seconds.values()), count),
    }


def mask_config(options: argparse.Namespace, volume: dict, held_out: int) -> Config:
    """SparseGPT on the default arm at a volume, without a refit."""
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
    """The noisy copies that both look at, (R, T)."""
    return calibration_at(model, options, volume, 0).noisy_ids.flatten(0, 1)


def _apart(model: DiffusionLM) -> DiffusionLM:
    """A model whose projections can be replaced; what is not replaced is shared."""
    return first_blocks(model, len(model.blocks))


@torch.no_grad()
def agreement(ours: Masked, plain: DiffusionLM, masks: dict[str, torch.Tensor]) -> dict:
    """Share of mask entries that are equal, in all blocks and in the first, and how far its weights are apart there.

    Args:
        plain: the model that `masks`, (O, C) bool by weight, belong to.
    """
    leading = {f"{name}.weight" for name in Adapter(plain).blocks[0].names.values()}
    equal, every, first = 0, 0, [0, 0]
    for name, kept in masks.items():
        same = int((unpack_bits(ours.masks.packed[name], kept.shape[1]) == kept).sum())
        equal, every = equal + same, every + kept.numel()
        if name in leading:
            first = [first[0] + same, first[1] + kept.numel()]
    pairs = [(ours.model.get_parameter(name).float(), plain.get_parameter(name).float()) for name in sorted(leading)]
    apart, size = (sum(float(part.square().sum()) for part in parts) ** 0.5
                   for parts in ([a - b for a, b in pairs], [b for _, b in pairs]))  # fmt: skip
    return {"masks": equal / every, "masks_of_first_block": first[0] / first[1], "weights_of_first_block": apart / size}
