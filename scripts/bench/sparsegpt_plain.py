"""SparseGPT as its paper describes it, with nothing shared or fused: what ours is timed against.

Every linear has a Gram matrix and a factorisation of its own (query, key and value too), and weights go column by
column in blocks of 128 (arXiv 2301.00774, algorithm 1). Blocks are pruned in order, each on what the pruned blocks
before it hand on. Shapes: R sequences, T positions, O outputs, C inputs.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from structprune.models.adapter import Adapter, BlockView
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import synchronise
from structprune.progress import Track, untracked

COLUMNS = 128  # whose mask is chosen at once
DAMPING = 0.01  # of the mean diagonal


@dataclass
class Phases:
    """Seconds by name of what was timed, the device's work included."""

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
    """Upper triangular U (C, C) with (G + damping mean(diag G) I)⁻¹ = UᵀU, and (C,) bool inputs that were always 0.

    Damping is raised tenfold where rounding leaves nothing positive definite.
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
    """One linear, column by column: new weight (O, C), and mask (O, C) bool, true where a weight stays.

    Args:
        weight: (O, C), upper: (C, C) and dead: (C,) of `inverse_factor`.
        ratio: of each block of columns every weight goes whose W² / U_cc² is at most the entry at `int(n * ratio)` of
            all n in order.
    """
    left = weight.clone()  # (O, C)
    left[:, dead] = 0
    kept = torch.ones_like(left, dtype=torch.bool)  # (O, C)
    for start in range(0, left.shape[1], block):
        stop = min(start + block, left.shape[1])
        part, own = left[:, start:stop], upper[start:stop, start:stop]  # (O, b) a view, (b, b)
        score = (part / own.diagonal()) ** 2  # (O, b)
        threshold = score.flatten().sort().values[int(score.numel() * ratio)]  # ()
        kept[:, start:stop] = score > threshold
        errors = torch.zeros_like(part)  # (O, b)
        for column in range(stop - start):
            now = part[:, column]  # (O,)
            error = torch.where(kept[:, start + column], 0.0, now) / own[column, column]  # (O,)
            part[:, column:] -= error[:, None] * own[column, column:]  # (O, b - column)
            errors[:, column] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]  # (O, C - stop)
    return left * kept, kept


@torch.no_grad()
def prune_plainly(
    model: DiffusionLM, ids: torch.Tensor, ratio: float, track: Track = untracked
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Prune every linear of every block in place, one sequence in a pass.

    Args:
        ids: (R, T) what to look at.
    Returns:
        Mask (O, C) bool on CPU by the weight's name, and seconds by phase (statistics, factorisation, columns, moving
        on).
    """
    adapter = Adapter(model)
    phases, masks = Phases(adapter.device), {}
    with phases.timed("statistics"):
        states = [model.embedding(row[None].to(adapter.device)) for row in ids]  # R x (1, T, C)
        rotary = model.rotary(ids.shape[1], adapter.device)
    for block in track(adapter.blocks, "plain SparseGPT"):
        with phases.timed("statistics"):
            grams = _grams(block, states, rotary)
        for role, name in block.names.items():
            linear = block[role]
            with phases.timed("factorisation"):
                upper, dead = inverse_factor(grams.pop(role))  # (C, C), (C,)
            with phases.timed("columns"):
                weight, kept = prune_columns(linear.weight.float(), upper, dead, ratio)  # (O, C) each
                linear.weight = torch.nn.Parameter(weight.to(linear.weight.dtype), linear.weight.requires_grad)
                masks[f"{name}.weight"] = kept.cpu()
        with phases.timed("moving on"):
            states = [block.module(x, rotary) for x in states]  # R x (1, T, C)
    return masks, phases.seconds


def _grams(block: BlockView, states: list[torch.Tensor], rotary) -> dict[str, torch.Tensor]:
    """Σ x xᵀ over all rows of what every linear reads, its own for each: role -> (C, C) fp32."""
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
        block.module(x, rotary)
    for handle in handles:
        handle.remove()
    return grams
