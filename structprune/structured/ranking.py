"""Drivers that collect what a score needs and turn it into a removal path for every block and kind of unit."""

from dataclasses import dataclass

import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings, StructuredSettings
from structprune.errors import UserError
from structprune.models.adapter import CONSUMER, Adapter, BlockView
from structprune.statistics.activations import add_gram, mirror, relative_weight
from structprune.statistics.gradients import gradient_sums
from structprune.statistics.hidden import HiddenStates
from structprune.statistics.moments import consumer_moments
from structprune.statistics.rows import Observe, Rows, Track, arm_rows, measure_mass, needs_sinks, unobserved, untracked
from structprune.structured.paths import KINDS, RemovalPath, static_path, step_groups
from structprune.structured.scores.fluctuation import fluctuation_ranks, fluctuation_scores
from structprune.structured.scores.magnitude import magnitude_scores
from structprune.structured.scores.obs import obs_path
from structprune.structured.scores.table import CRITERIA
from structprune.structured.scores.taylor import taylor_scores
from structprune.structured.scores.wanda import wanda_scores

Key = tuple[int, str]  # (block index, kind of unit)
PASS_TOKENS = 8192  # at most in a forward pass that need not see whole windows, where a sequence is not longer


@dataclass(frozen=True)
class Limits:
    """How much goes through at once: windows per forward pass, bytes that statistics may hold, and whether hidden
    states are copied while others are computed with."""

    windows: int = 1
    budget: int = 2**33
    overlap: bool = False

    def sequences(self, copies: int, length: int) -> int:
        """Sequences of `length` tokens in a forward pass: all `copies` of its windows, or those in `PASS_TOKENS`.

        For what takes sequences one by one; scores that need all levels of a window in a pass run `windows` windows.
        """
        return max(1, min(self.windows * copies, PASS_TOKENS // length))


def block_groups(block: BlockView, kind: str, form: str) -> list[list[int]]:
    """Units of one kind in step groups (`step_groups`): for query heads of a GQA block one group per KV head."""
    widths = block.widths
    if kind == "channels":
        return step_groups(widths.channels, 1)
    if form == "kv_groups":
        return step_groups(widths.kv_heads, 1)
    return step_groups(widths.query_heads, 1 if widths.query_heads == widths.kv_heads else widths.kv_heads)


def coupled_slices(block: BlockView, kind: str, form: str, tensors: dict) -> list[torch.Tensor]:
    """Every weight slice that goes with each unit, flattened: U units -> tensors (U, n_i).

    Args:
        tensors: (role, "weight" or "bias") -> the tensor to slice (weights, or products with gradients).
    """
    units = sum(len(group) for group in block_groups(block, kind, form))
    if kind == "channels":
        rows = ("gate", "up")
    elif form == "kv_groups" or block.widths.query_heads == block.widths.kv_heads:
        rows = ("query", "key", "value")
    else:
        rows = ("query",)
    parts = [tensors[key].reshape(units, -1) for key in tensors if key[0] in rows]  # (U, n)
    return [*parts, tensors[CONSUMER[kind], "weight"].T.reshape(units, -1)]


def block_tensors(block: BlockView) -> dict:
    """(role, name) -> parameter of the seven linears of a block."""
    roles = ("query", "key", "value", "attention_output", "gate", "up", "down")
    return {(role, name): value for role in roles for name, value in block[role].named_parameters()}


def rank_units(
    adapter: Adapter,
    calibration: Calibration | None,
    settings: StructuredSettings,
    arm: str | None,
    sink: SinkSettings,
    limits: Limits = Limits(),
    track: Track = untracked,
    observe: Observe = unobserved,
) -> dict[Key, RemovalPath]:
    """Removal paths of every block and kind by the score in `settings`, on `arm` (see `scores.table.resolve_arm`).

    Args:
        observe: is shown the mass that sink weights are made from, in the order of windows and levels.
    """
    collect = {"weights": _by_magnitude, "moments": _by_moments, "grams": _by_obs, "gradients": _by_taylor}
    return collect[CRITERIA[settings.score].needs](adapter, calibration, settings, arm, sink, limits, track, observe)


def _by_magnitude(adapter, calibration, settings, arm, sink, limits, track, observe) -> dict[Key, RemovalPath]:
    paths = {}
    for block in track(adapter.blocks, "magnitudes"):
        for kind in KINDS:
            with torch.no_grad():
                score = magnitude_scores(coupled_slices(block, kind, settings.gqa, block_tensors(block)))  # (U,)
            paths[block.index, kind] = static_path(score**2, block_groups(block, kind, settings.gqa))
    return paths


def _by_moments(adapter, calibration, settings, arm, sink, limits, track, observe) -> dict[Key, RemovalPath]:
    # whole windows: inputs wait for the weights of their pass, which policies make of all levels of a window
    measured = consumer_moments(adapter, calibration, arm, sink, limits.windows, limits.budget, track, observe)
    paths = {}
    for block in adapter.blocks:
        for kind in KINDS:
            seen = measured[block.index, CONSUMER[kind]]
            weight = block[CONSUMER[kind]].weight.detach().to(seen.mean.device)  # (O, C)
            groups = block_groups(block, kind, settings.gqa)
            width = weight.shape[1] // sum(len(group) for group in groups)
            if settings.score == "wanda":
                paths[block.index, kind] = static_path(wanda_scores(weight, seen.squared_norm, width), groups)
            else:
                score = fluctuation_scores(weight, seen.variance, width)  # (U,)
                rank = fluctuation_ranks(weight, seen.variance, width)  # (U,)
                paths[block.index, kind] = static_path(score * width, groups, rank)
    return paths


def calibration_rows(adapter, calibration, arm, sink, limits, track, observe=unobserved) -> Rows:
    """The rows of an arm, with sink weights measured by a pass of their own where it needs them."""
    batch = limits.sequences(calibration.levels, calibration.length)  # all mass is here before any of it is weighed
    mass = measure_mass(adapter, calibration, batch, track, observe) if needs_sinks(arm, sink) else None
    return arm_rows(calibration, arm, sink, mass, adapter.mask_id)


@torch.inference_mode()
def _by_obs(adapter, calibration, settings, arm, sink, limits, track, observe) -> dict[Key, RemovalPath]:
    rows = calibration_rows(adapter, calibration, arm, sink, limits, track, observe)
    batch = limits.sequences(rows.copies, calibration.length)
    states = HiddenStates(adapter, rows.ids, batch, limits.budget, limits.overlap)
    paths = {}
    for block in track(adapter.blocks, f"obs scores ({arm})"):
        grams = _advance_with_grams(block, states, rows, settings.relative is not False, adapter.device)
        for kind in KINDS:
            groups = block_groups(block, kind, settings.gqa)
            rounds = settings.rounds if kind == "channels" else None
            gram = grams.pop(kind)  # (C, C)
            weight = block[CONSUMER[kind]].weight.to(gram.device)  # (O, C)
            paths[block.index, kind] = obs_path(weight, gram, groups, settings.damping, rounds)
    return paths


def _advance_with_grams(
    block: BlockView, states: HiddenStates, rows: Rows, relative: bool, device: torch.device
) -> dict[str, torch.Tensor]:
    """Run one block over all rows; mean of x̃ x̃ᵀ over rows of what its two consumers read, (C, C) each."""
    sizes = {kind: block[CONSUMER[kind]].in_features for kind in KINDS}
    grams = {kind: torch.zeros(size, size, device=device) for kind, size in sizes.items()}  # (C, C)
    totals = {kind: torch.zeros((), dtype=torch.float64, device=device) for kind in KINDS}  # Σ ω², on the device
    for part in states.slices():
        x, omega = states.read(part), rows.part(part, device)  # (b, T, C), (b, T)
        for kind in KINDS:
            read = block.module.mix(x, states.rotary) if kind == "attention" else block.module.activate(x)  # (b, T, .)
            weight = relative_weight(x, omega) if relative else omega  # (b, T)
            add_gram(grams[kind], read, weight)
            totals[kind] += x.shape[0] * x.shape[1] if weight is None else weight.double().pow(2).sum()
            x = x + block[CONSUMER[kind]](read)  # (b, T, C)
        states.write(part, x)
    return {kind: mirror(gram).div_(totals[kind]) for kind, gram in grams.items()}


def _by_taylor(adapter, calibration, settings, arm, sink, limits, track, observe) -> dict[Key, RemovalPath]:
    if calibration.mask_probability is None:
        raise UserError("score 'taylor' needs mask probabilities, which the replayed calibration file does not have")
    rows = calibration_rows(adapter, calibration, arm, sink, limits, track, observe)
    tensors = {block.index: block_tensors(block) for block in adapter.blocks}
    flat = [(index, key, value) for index, part in tensors.items() for key, value in part.items()]
    batch = limits.sequences(rows.copies, calibration.length)
    sums = gradient_sums(
        adapter, calibration, rows, [value for *_, value in flat], batch, limits.budget, track, f"gradients ({arm})"
    )
    products: dict[int, dict] = {index: {} for index in tensors}
    for (index, key, value), total in zip(flat, sums):
        products[index][key] = total.mul_(value.detach())
    paths = {}
    for block in adapter.blocks:
        for kind in KINDS:
            score = taylor_scores(coupled_slices(block, kind, settings.gqa, products[block.index]))  # (U,)
            paths[block.index, kind] = static_path(score, block_groups(block, kind, settings.gqa))
    return paths
