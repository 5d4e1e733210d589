"""A training step of a small masked diffusion LM: schedules, noise, loss, and the Muon optimizer in fp32.

Papers: LLaDA arXiv 2502.09992, Muon at scale arXiv 2502.16982. Shapes: B sequences, T tokens, M masked tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from structprune.calibration.noise import stratified_times
from structprune.models.modeling_structprune import StructpruneLLaDA

WARMUP = 100  # steps over which the learning rate rises
DECAY = 0.6  # share of the run, at its end, over which the rate falls to zero
EASY = 0.25  # share of the run, at its start, with few masked tokens, which leaves the unigram plateau much sooner
EASY_RATES, FULL_RATES = (0.1, 0.4), (0.03, 1.0)
LONG_EVERY = 4  # every fourth step has half as many windows of twice the length
QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients that drive singular values to about 1


def rate_factor(step: int, progress: float, warmup: int = WARMUP) -> float:
    """Share of the peak learning rate at `step` (from 0); `progress` is the finished share of the run."""
    return min(1.0, (step + 1) / warmup) * min(1.0, (1 - progress) / DECAY)


def mask_rates(progress: float) -> tuple[float, float]:
    """The lowest and highest mask rate."""
    return EASY_RATES if progress < EASY else FULL_RATES


def batch_shape(step: int, batch: int, length: int) -> tuple[int, int]:
    """(B, T) of a step."""
    return (max(1, batch // 2), 2 * length) if step % LONG_EVERY == LONG_EVERY - 1 else (batch, length)


def draw_windows(tokens: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Windows at random positions of the corpus: (number of tokens,) -> (count, length) int64."""
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)  # (B, 1)
    return tokens[starts + torch.arange(length)].long()  # (B, T)


def draw_masks(count: int, length: int, rates: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    """Tokens to mask: (B, T) bool, with rates stratified over the batch and at least one token per sequence."""
    low, high = rates
    rate = low + (high - low) * stratified_times(count, generator).float()[:, None]  # (B, 1)
    draw = torch.rand(count, length, generator=generator)  # (B, T)
    return (draw < rate) | (draw == draw.amin(dim=1, keepdim=True))


def masked_loss(model: StructpruneLLaDA, ids: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Cross-entropy averaged over each sequence's masked tokens, then over sequences: 2 x (B, T) -> scalar."""
    noisy = ids.masked_fill(masked, model.config.mask_token_id)  # (B, T)
    logits = model.output_head(model.encode(noisy)[masked])  # (M, V)
    nats = F.cross_entropy(logits.float(), ids[masked], reduction="none")  # (M,)
    share = 1 / masked.sum(dim=1, keepdim=True)  # (B, 1)
    return (nats * share.expand_as(ids)[masked]).sum() / len(ids)


def newton_schulz(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximately the nearest orthogonal matrices: all singular values become about 1, in the input's dtype.

    Args:
        matrices: (N, rows, columns).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices  # (N, r, c), r <= c, which keeps products small
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a, b, c = QUINTIC
    for _ in range(steps):
        square = x @ x.transpose(1, 2)  # (N, r, r)
        x = a * x + (b * square + c * square @ square) @ x  # (N, r, c)
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised in fp32, for matrices only (torch's Muon uses bf16, which is very slow on CPU).

    A step has an RMS of 0.2 · lr per element for any shape: the update is scaled by lr · 0.2 · sqrt(longer side).
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}  # matrices of one shape are orthogonalised together
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = torch.stack([self._direction(p, group["momentum"]) for p in parameters])  # (N, rows, columns)
                scale = -group["lr"] * 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, newton_schulz(updates), strict=True):
                    parameter.add_(update, alpha=scale)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov momentum of a gradient."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].mul_(momentum).add_(parameter.grad)
        return parameter.grad + momentum * average


def make_optimizers(model: StructpruneLLaDA, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embedding, head and norms; `peak` in a group is its highest rate."""
    ids = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    matrices = [p for p in model.parameters() if id(p) in ids]
    rest = [p for p in model.parameters() if id(p) not in ids]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, muon_lr),
        torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
