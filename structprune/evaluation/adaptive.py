"""When more Monte Carlo blocks can no longer be expected to change a choice.

The question is not which answer is truly likelier, but which one the full count of samples on the same stream would
choose. So the samples run are a sample without replacement of the full count's, the others are forecast (`forecast`),
and the standard error of a mean advantage is that of the forecasts. Shapes: A answers, N samples in full.
"""

import math
from typing import Sequence

import torch

from structprune.evaluation.forecast import Completed

GROWTH = 1.125  # blocks at one look over those at the look before
LEAST = 16  # samples at the first look: of fewer, noise is so large that a flat prior of the gap would be no prior


def look_schedule(blocks: int, rows: int) -> list[int]:
    """Numbers of blocks after which a choice is looked at, the last being all: 2, 3, ..., 16, 18, 20, ..., `blocks`.

    Args:
        rows: samples of a block; of small ones the first look waits for LEAST samples.
    """
    looks = [min(max(2, math.ceil(LEAST / rows)), blocks)]
    while looks[-1] < blocks:
        looks.append(min(blocks, max(looks[-1] + 1, int(looks[-1] * GROWTH))))
    return looks


def student_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's t with whole degrees of freedom, t >= 0 (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = total = cosine if odd else 1.0
    for index in range(3 if odd else 2, freedom - 1, 2):
        term *= (index - 1) / index * cosine**2
        total += term
    if odd:
        inside = (angle + (math.sin(angle) * total if freedom > 1 else 0.0)) * 2 / math.pi
    else:
        inside = math.sin(angle) * total
    return max(0.0, (1 - inside) / 2)


def decided(answers: Sequence[Completed], sizes: torch.Tensor, confidence: float) -> bool:
    """Whether all samples would choose as those run and the forecasts of the others do, raw and divided by size.

    Every other answer must lag behind the leader, in each of the two senses, by more than chance explains: a
    one-sided paired t-test whose error is shared (Bonferroni) by the answers and the two senses. Not by the looks: the
    tail is the posterior probability, under a flat prior of the gap, that the full count turns it round, whenever one
    looks. So the confidence holds on average over items of many gaps, near ties among them, as the tests try it.

    Args:
        answers: of one item, whose samples share their noise; an exact one has residuals of 0 and nothing unknown.
        sizes: (A,) what the normalised choice divides by.
        confidence: that neither choice would change.
    """
    if len(answers) < 2:
        return False
    allowed = (1 - confidence) / ((len(answers) - 1) * 2)
    for by in ([1.0] * len(answers), sizes.tolist()):
        lead = min(range(len(answers)), key=lambda index: answers[index].values.mean().item() / by[index])
        for index in range(len(answers)):
            if index != lead and not _behind(answers[index], by[index], answers[lead], by[lead], allowed):
                return False
    return True


def _behind(other: Completed, other_size: float, leader: Completed, size: float, allowed: float) -> bool:
    """Whether the leader's lead would be lost with a probability of at most `allowed`.

    Degrees of freedom are those of the answer that is forecast from fewer masks.
    """
    gap = Completed(
        other.values / other_size - leader.values / size,
        torch.maximum(other.repeats, leader.repeats),
        other.residuals / other_size - leader.residuals / size,
        other.influence / other_size - leader.influence / size,
        other.fresh | leader.fresh,
    )
    freedom = min((int(part.fresh.sum()) - 1 for part in (other, leader) if part.repeats.any()), default=1)
    advantage, noise = gap.values.mean().item(), gap.error()
    if freedom < 1 or not math.isfinite(advantage + noise):  # a single mask shows no spread; nats may be NaN
        return False
    if noise == 0:
        return advantage > 0
    return student_tail(advantage / noise, freedom) <= allowed
