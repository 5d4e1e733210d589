"""Monte Carlo perturbations of a target, in LLaDA's and Dream's forms, as pure functions (docs/methods.md section 6).

All randomness comes from uniform numbers of one item, so that its answers, and all checkpoints, share their noise and
differences are paired. Papers: LLaDA arXiv 2502.09992 (Appendix B.5), Dream arXiv 2508.15487. Shapes: K blocks of
b samples, N = K·b samples, L target tokens.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

import torch

from structprune.models.noising import mask_rate

Sampling = Literal["stratified", "published"]
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Perturbed:
    """Samples of one target: where it is masked, and factors of the summed cross-entropies (1 / mask probability)."""

    masked: torch.Tensor  # (N, L) bool
    weight: torch.Tensor  # (N,) float64


@dataclass(frozen=True)
class Form:
    """How a likelihood is estimated: what differs between the families' published estimators."""

    perturb: Callable[[torch.Tensor, torch.Tensor], Perturbed]  # levels and positions in [0, 1) -> samples
    level_per_sample: bool  # whether levels are (N,), one per sample, or (K,), one per block
    hidden_last: bool  # whether the last token of the sequence is never masked
    guidance: Callable[[float], float]  # w as a user gives it -> the scale s of u + (1 + s)(c - u)


def item_generator(seed: int, key: str) -> torch.Generator:
    """An item's own stream of noise on CPU, from SHA-256 of the seed and the item's key."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def spread(count: int, period: int, generator: torch.Generator) -> torch.Tensor:
    """Low-discrepancy numbers (u + j a) mod 1 with one u ~ U(0, 1): (count,) float64.

    Each number is uniform, so that any weighting of them is unbiased. Every prefix of them, and of every `period`-th
    one, fills the unit interval evenly (a Kronecker sequence: period · a is the golden ratio mod 1, and a is the number
    closest to the golden ratio with this property).
    """
    step = (GOLDEN + round(GOLDEN * (period - 1))) / period
    start = torch.rand(1, generator=generator, dtype=torch.float64)  # (1,)
    return (start + step * torch.arange(count, dtype=torch.float64)) % 1  # (count,)


def draw_uniform(
    form: Form, samples: int, block: int, width: int, sampling: Sampling, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The uniform numbers of one item: levels (K,) or (N,), and one per sample and position, (N, width).

    Args:
        width: of `aligned_columns`.
        sampling: "published" draws levels independently, "stratified" spreads them evenly.
    """
    count = samples if form.level_per_sample else samples // block
    if sampling == "published":
        levels = torch.rand(count, generator=generator, dtype=torch.float64)  # (K,) or (N,)
    else:
        levels = spread(count, 1 if form.level_per_sample else block, generator)  # (K,) or (N,)
    return levels, torch.rand(samples, width, generator=generator, dtype=torch.float64)  # (N, width)


def aligned_columns(targets: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """Which uniform numbers each answer's tokens use, so that tokens that answers share are masked together.

    Answers of a question often differ in a word or two. When equal tokens use the same number at any position, the same
    tokens of all answers are masked in a sample, and the difference varies less. Tokens are matched in order with those
    of the first answer. Tokens that replace each other also share a number; the others have their own.

    Returns:
        (L,) int64 columns of each target (L,), all different, and the number of columns.
    """
    first, columns = targets[0].tolist(), [torch.arange(len(targets[0]))]  # (L,)
    width = len(first)
    for target in targets[1:]:
        own: list[int] = []
        for _, start, stop, begin, end in SequenceMatcher(None, first, target.tolist(), False).get_opcodes():
            shared = min(stop - start, end - begin)
            extra = end - begin - shared
            own += [*range(start, start + shared), *range(width, width + extra)]
            width += extra
        columns.append(torch.tensor(own))  # (L,)
    return columns, width


def masked_counts(first: torch.Tensor, length: int, block: int) -> torch.Tensor:
    """LLaDA: numbers of masked tokens of every block's samples, ((round(linspace(k, k + (b-1)·L/b)) - 1) mod L) + 1.

    `first` holds k in 1..L of each block, (K,) int64. Returns (K, b) int64 in 1..L; halves are rounded to even.
    """
    counts = [torch.linspace(k, k + (block - 1) * (length / block), steps=block).round() for k in first.tolist()]
    return (torch.stack(counts).long() - 1) % length + 1  # (K, b)


def fixed_count(levels: torch.Tensor, positions: torch.Tensor) -> Perturbed:
    """LLaDA: levels (K,) and positions (N, L), both uniform in [0, 1) -> samples, N / K per block.

    k = 1 + floor(L u) is uniform over 1..L; a sample masks the positions of its lowest numbers; the weight is
    L / (number masked).
    """
    samples, length = positions.shape
    first = 1 + (levels * length).long().clamp(max=length - 1)  # (K,)
    counts = masked_counts(first, length, samples // len(levels)).flatten()  # (N,)
    rank = positions.argsort(dim=1).argsort(dim=1)  # (N, L)
    return Perturbed(rank < counts[:, None], length / counts.double())


def independent(levels: torch.Tensor, positions: torch.Tensor) -> Perturbed:
    """Dream: times (N,) and positions (N, L), both uniform in [0, 1) -> samples.

    Every token but the last is masked independently with p = mask_rate(t); the weight is 1 / p.
    """
    p = mask_rate(levels).double()  # (N,)
    masked = positions < p[:, None]  # (N, L)
    masked[:, -1] = False
    return Perturbed(masked, 1 / p)


FORMS: dict[str, Form] = {
    "fixed_count": Form(fixed_count, level_per_sample=False, hidden_last=False, guidance=lambda w: w),
    "independent": Form(independent, level_per_sample=True, hidden_last=True, guidance=lambda w: max(w - 1, 0.0)),
}
