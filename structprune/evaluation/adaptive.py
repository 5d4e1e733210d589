"""When further Monte Carlo blocks are no longer expected to change a choice.

The question is not which answer is truly likelier, but which one all samples of the same stream would choose. So the
samples that were run are drawn without replacement from all samples, the others are forecast (`forecast`), and the
standard error of a mean advantage is that of the forecasts. Shapes: A answers, N samples in all.
"""

import math
from collections.abc import Sequence

import torch

from structprune.evaluation.forecast import Completed

GROWTH = 1.125  # ratio of the blocks at one look to those at the look before
LEAST = 16  # samples at the first look: with fewer, noise is so large that the flat prior of the gap misleads


def look_schedule(blocks: int, rows: int) -> list[int]:
    """Numbers of blocks after which a choice is tested, the last being all: 2, 3, ..., 16, 18, 20, ..., `blocks`.

    Args:
        rows: samples of a block; the first look waits for LEAST samples.
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
    """Whether the choice is unlikely to change with all samples, both by total nats and by nats per size.

    In both senses every other answer must be behind the leader by more than chance explains: a one-sided paired t-test,
    whose error is split (Bonferroni) between the answers and the two senses, but not between the looks. Under a flat
    prior of the gap, the tail is the posterior probability that all samples reverse it, at whichever look. So the
    confidence holds on average over items with many gaps, near ties included; the tests check this.

    Args:
        answers: of one item, whose samples share their noise; an exact one has residuals of 0 and no forecasts.
        sizes: (A,) divisors of the normalised choice.
        confidence: that neither choice would change.
    """
    if len(answers) < 2:
        return False
    allowed = (1 - confidence) / ((len(answers) - 1) * 2)
    for divisors in ([1.0] * len(answers), sizes.tolist()):
        rates = [answer.values.mean().item() / divisor for answer, divisor in zip(answers, divisors, strict=True)]
        lead = rates.index(min(rates))
        for index in range(len(answers)):
            if index != lead and not _behind(answers[index], divisors[index], answers[lead], divisors[lead], allowed):
                return False
    return True


def _behind(other: Completed, other_size: float, leader: Completed, size: float, allowed: float) -> bool:
    """Whether the leader loses its lead with a probability of at most `allowed`.

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
    if freedom < 1 or not math.isfinite(advantage + noise):  # a single mask has no spread; nats may be NaN
        return False
    if noise == 0:
        return advantage > 0
    return student_tail(advantage / noise, freedom) <= allowed
