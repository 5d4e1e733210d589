"""SparseGPT as its paper describes it, with nothing shared or fused: the baseline that ours is timed against.

Every linear has its own Gram matrix and factorisation (also query, key and value), and weights are removed column by
column in blocks of 128 (arXiv 2301.00774, algorithm 1). Blocks are pruned in order, each on the outputs of the pruned
blocks before it. Shapes: R sequences, T positions, O outputs, C inputs.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from structprune.models.adapter import Adapter, BlockView
from structprune.models.layers_structprune import AttentionContext
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import synchronise
from structprune.progress import Track, untracked

COLUMNS = 128  # columns whose mask is chosen at once
DAMPING = 0.01  # relative to the mean diagonal


@dataclass
class Phases:
    """Seconds by phase, including work on the device."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str):
        synchronise(self.device)
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def inverse_factor(gram: torch.Tensor, damping: float = DAMPING) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper triangular U (C, C) with (G + damping mean(diag G) I)⁻¹ = UᵀU, and (C,) bool: inputs that are always 0.

    Damping is raised tenfold while the damped matrix is not numerically positive definite.
    """
    dead, scale = gram.diagonal() == 0, gram.diagonal().mean()  # (C,), ()
    while True:
        damped = gram.clone()  # (C, C)
        damped.diagonal()[dead] = 1
        damped.diagonal().add_(damping * scale)
        lower, failed = torch.linalg.cholesky_ex(damped)  # (C, C)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)  # (C, C)
        if not failed:
            return upper, dead
        damping = max(10 * damping, 1e-4)


def prune_columns(
    weight: torch.Tensor, upper: torch.Tensor, dead: torch.Tensor, ratio: float, block: int = COLUMNS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune one linear column by column: new weight (O, C), and mask (O, C) bool, true where a weight stays.

    Args:
        weight: (O, C). upper, dead: (C, C) and (C,) from `inverse_factor`.
        ratio: in each block of columns, a weight is removed if its W² / U_cc² is at most the sorted entry at index
            `int(n * ratio)` of all n.
    """
    pruned = weight.clone()  # (O, C)
    pruned[:, dead] = 0
    mask = torch.ones_like(pruned, dtype=torch.bool)  # (O, C)
    for start in range(0, pruned.shape[1], block):
        stop = min(start + block, pruned.shape[1])
        part, own = pruned[:, start:stop], upper[start:stop, start:stop]  # (O, b) a view, (b, b)
        score = (part / own.diagonal()) ** 2  # (O, b)
        threshold = score.flatten().sort().values[int(score.numel() * ratio)]  # ()
        mask[:, start:stop] = score > threshold
        errors = torch.zeros_like(part)  # (O, b)
        for column in range(stop - start):
            error = torch.where(mask[:, start + column], 0.0, part[:, column]) / own[column, column]  # (O,)
            part[:, column:] -= error[:, None] * own[column, column:]  # (O, b - column)
            errors[:, column] = error
        pruned[:, stop:] -= errors @ upper[start:stop, stop:]  # (O, C - stop)
    return pruned * mask, mask


@torch.no_grad()
def prune_plainly(
    model: DiffusionLM, ids: torch.Tensor, ratio: float, track: Track = untracked
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Prune every linear of every block in place, one sequence per pass.

    Args:
        ids: (R, T) calibration ids.
    Returns:
        Weight name -> mask (O, C) bool on CPU; phase (statistics, factorisation, columns, moving on) -> seconds.
    """
    adapter = Adapter(model)
    phases = Phases(adapter.device)
    masks: dict[str, torch.Tensor] = {}
    with phases.timed("statistics"):
        states = [model.embedding(row[None].to(adapter.device)) for row in ids]  # R x (1, T, C)
        context = model.context(ids.shape, adapter.device)
    for block in track(adapter.blocks, "plain SparseGPT"):
        with phases.timed("statistics"):
            grams = _grams(block, states, context)
        for role, name in block.names.items():
            linear = block[role]
            with phases.timed("factorisation"):
                upper, dead = inverse_factor(grams.pop(role))  # (C, C), (C,)
            with phases.timed("columns"):
                weight, mask = prune_columns(linear.weight.float(), upper, dead, ratio)  # (O, C) each
                linear.weight = torch.nn.Parameter(weight.to(linear.weight.dtype), linear.weight.requires_grad)
                masks[f"{name}.weight"] = mask.cpu()
        with phases.timed("moving on"):
            states = [block.module(x, *context) for x in states]  # R x (1, T, C)
    return masks, phases.seconds


def _grams(block: BlockView, states: list[torch.Tensor], context: AttentionContext) -> dict[str, torch.Tensor]:
    """Σ x xᵀ over the input rows of every linear, computed separately for each: role -> (C, C) fp32."""
    grams = {
        role: torch.zeros(block[role].in_features, block[role].in_features, device=states[0].device)
        for role in block.names
    }

    def hook(role: str):
        def add(module, args) -> None:
            rows = args[0].flatten(0, -2).float()  # (T, C)
            grams[role] += rows.T @ rows  # (C, C)

        return add

    handles = [block[role].register_forward_pre_hook(hook(role)) for role in block.names]
    for x in states:
        block.module(x, *context)
    for handle in handles:
        handle.remove()
    return grams
