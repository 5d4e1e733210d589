"""Paired statistics of two models that saw the same noise."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from structprune.errors import UserError

RESAMPLES = 10_000
FEWEST = 6  # items that must differ for an interval: with 5, all gaps have one sign by chance in 2 / 2^5 > 5% of cases
CELLS = 1 << 20  # resampled counts in memory at a time

Parts = Mapping[str, tuple[float, float]]  # item key -> (numerator, denominator)


def paired_difference(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any]:
    """Mean of ours - theirs over pairs, its standard error, and a 95% normal interval.

    Args:
        ours, theirs: (N,) values of the same windows under the same noise.
    Returns:
        `mean`, `standard_error`, `low`, `high` in the unit of the values; for a single pair all but the mean are None.
    """
    gap = ours.double() - theirs.double()  # (N,)
    mean = gap.mean().item()
    if len(gap) < 2:
        return {"mean": mean, "standard_error": None, "low": None, "high": None}
    error = gap.std().item() / len(gap) ** 0.5
    return {"mean": mean, "standard_error": error, "low": mean - 1.96 * error, "high": mean + 1.96 * error}


@dataclass(frozen=True)
class Bootstrap:
    """A difference, ours - theirs, over the items that both have and over these resampled with replacement."""

    value: float
    resampled: np.ndarray  # (R,) float64
    items: int
    left_out: int  # items that only one has
    smallest: int  # items of the smallest task in it
    differing: int  # items on which both differ


@dataclass(frozen=True)
class Comparison:
    """A difference with its 95% interval; both ends are None where too few items differ."""

    difference: float
    low: float | None
    high: float | None
    items: int
    left_out: int
    verdict: str  # `better`, `worse`, or `no difference shown` without an interval or where it contains 0


def paired_bootstrap(
    ours: Parts, theirs: Parts, task: str = "", seed: int = 0, resamples: int = RESAMPLES
) -> Bootstrap:
    """Difference of two ratios of sums (means, where denominators are 1) over the same items, and its bootstrap.

    An item is drawn as the numerators and denominators of both at once. Items with equal numbers are drawn together:
    their count is multinomial, which has the same distribution and is cheap where items are only right or wrong.

    Args:
        task: gives every task its own random stream, so that tasks can be averaged.
    Raises:
        UserError: no item in common, or only items without a denominator.
    """
    keys = [key for key in ours if key in theirs]
    if not keys:
        raise UserError(f"task '{task}': no item in common, so nothing can be compared: evaluate the same items")
    pairs = np.array([(*ours[key], *theirs[key]) for key in keys], dtype=np.float64)  # (N, 4)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)  # (U, 4), (U,)
    value = _difference(counts[None], kinds)[0]
    if not np.isfinite(value):
        raise UserError(f"task '{task}': shared items without a denominator cannot be compared: evaluate more items")
    generator = np.random.default_rng([seed, zlib.crc32(task.encode())])
    step, parts = max(1, CELLS // len(kinds)), []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        parts.append(_difference(generator.multinomial(len(keys), counts / len(keys), size), kinds))  # (step,)
    resampled = np.concatenate(parts)  # (R,)
    left_out = len(set(ours) ^ set(theirs))
    differing = int(counts[(kinds[:, :2] != kinds[:, 2:]).any(1)].sum())
    return Bootstrap(float(value), resampled[np.isfinite(resampled)], len(keys), left_out, len(keys), differing)


def average(tasks: Sequence[Bootstrap]) -> Bootstrap:
    """The mean over tasks, each resampled within itself."""
    return Bootstrap(
        sum(task.value for task in tasks) / len(tasks),
        np.mean([task.resampled for task in tasks], axis=0),
        sum(task.items for task in tasks),
        sum(task.left_out for task in tasks),
        min(task.smallest for task in tasks),
        sum(task.differing for task in tasks),
    )


def conclude(bootstrap: Bootstrap, higher_is_better: bool) -> Comparison:
    """The 95% interval of a bootstrap, and its verdict.

    Plain percentiles are too narrow for few items. The percentiles here are further out, by Student's t and by the
    factor n - 1 of a variance (expanded percentile interval; T. Hesterberg, The American Statistician 69(4), 2015).
    """
    low = high = None
    verdict = "no difference shown"
    if min(bootstrap.smallest, bootstrap.differing) >= FEWEST:
        freedom = max(1, bootstrap.smallest - 1)
        tail = NormalDist().cdf(-((bootstrap.smallest / freedom) ** 0.5) * student_t(freedom))
        low, high = map(float, np.quantile(bootstrap.resampled, (tail, 1 - tail)))
        if low > 0 or high < 0:
            verdict = "better" if (low > 0) == higher_is_better else "worse"
    return Comparison(bootstrap.value, low, high, bootstrap.items, bootstrap.left_out, verdict)


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t, by the expansion around the normal one (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def _difference(counts: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """(R, U) how often each kind, (U, 4) its numerator and denominator in both -> (R,) differences of ratios.

    a/b - c/d is computed as ((a - c) - (b - d) c/d) / b, so that equal models differ by exactly 0 despite rounding.
    """
    ours, below, theirs, below_theirs = kinds.T  # (U,) each
    columns = np.stack((ours - theirs, below - below_theirs, below, theirs, below_theirs), axis=1)  # (U, 5)
    gap, gap_below, below, theirs, below_theirs = (counts.astype(np.float64) @ columns).T  # (R,) each
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw without masked tokens is not finite
        return (gap - gap_below * (theirs / below_theirs)) / below
