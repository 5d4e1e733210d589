"""The rows of results: one for each evaluated item, and the metrics that rows have."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from structprune.errors import UserError, nearest


@dataclass(frozen=True)
class Metric:
    """A figure of a task: the sum of its items' numerators over the sum of their denominators."""

    name: str
    higher_is_better: bool
    proportion: bool  # whether items are right or wrong (1 or 0 over 1) rather than real numbers


METRICS = {
    metric.name: metric
    for metric in (
        Metric("acc", higher_is_better=True, proportion=True),
        Metric("acc_norm", higher_is_better=True, proportion=True),
        Metric("exact_match", higher_is_better=True, proportion=True),
        Metric("nelbo", higher_is_better=False, proportion=False),
        Metric("masked_ce", higher_is_better=False, proportion=False),
    )
}


def metric_of(name: str) -> Metric:
    """A metric by its name, `exact_match` or lm-eval's `exact_match,FILTER`.

    Raises:
        UserError: no metric has that name.
    """
    base = name.partition(",")[0]
    if base not in METRICS:
        raise UserError(f"unknown metric '{name}'{nearest(base, list(METRICS))}: {', '.join(METRICS)}")
    return replace(METRICS[base], name=name)


class _Graded:
    """A row whose metrics are its task's grades."""

    metrics: Mapping[str, float]

    @property
    def parts(self) -> dict[str, tuple[float, float]]:
        """Metric -> (numerator, denominator)."""
        return {name: (value, 1.0) for name, value in self.metrics.items()}


@dataclass(frozen=True)
class Choices(_Graded):
    """A multiple-choice item; its key is unique in its task and pairs it between checkpoints."""

    kind: Literal["choices"] = field(default="choices", kw_only=True)
    task: str
    key: str
    log_likelihoods: tuple[float, ...]  # nats of each answer, summed over its tokens
    errors: tuple[float | None, ...]  # Monte Carlo standard errors, 0 where exact, None with a single block of samples
    sizes: tuple[int, ...]  # characters of each answer, by which acc_norm divides
    gold: int | None  # index of the right answer, None where only the task's own code knows it
    samples: int  # Monte Carlo samples run for an answer
    full_samples: int  # the number allowed
    metrics: Mapping[str, float]

    def __post_init__(self) -> None:
        errors = [error for error in self.errors if error is not None]
        _check_finite(self, (*self.log_likelihoods, *errors, *self.metrics.values()))
        _check_metrics(self, self.metrics)
        if not len(self.log_likelihoods) == len(self.errors) == len(self.sizes) > 0 or min(self.sizes) < 1:
            raise UserError(f"{_named(self)}: every answer needs a log-likelihood, an error and a size of at least 1")
        if self.gold is not None and not 0 <= self.gold < len(self.log_likelihoods):
            raise UserError(f"{_named(self)}: gold answer {self.gold}, but there are {len(self.log_likelihoods)}")

    @property
    def choice(self) -> int:
        """The likeliest answer, the first of equals."""
        return int(np.argmax(self.log_likelihoods))

    @property
    def choice_norm(self) -> int:
        """The answer likeliest per character, the first of equals."""
        return int(np.argmax(np.divide(self.log_likelihoods, self.sizes)))


@dataclass(frozen=True)
class Window:
    """A window of text under noise, of `samples` noisy copies."""

    kind: Literal["window"] = field(default="window", kw_only=True)
    task: str
    key: str
    nelbo: float  # nats per maskable token
    masked_nats: float  # cross-entropy summed over the masked tokens of all copies
    masked_tokens: int
    samples: int
    full_samples: int

    def __post_init__(self) -> None:
        _check_finite(self, (self.nelbo, self.masked_nats, self.masked_tokens))

    @property
    def parts(self) -> dict[str, tuple[float, float]]:
        """Metric -> (numerator, denominator)."""
        return {"nelbo": (self.nelbo, 1.0), "masked_ce": (self.masked_nats, float(self.masked_tokens))}


@dataclass(frozen=True)
class Generation(_Graded):
    """A generated answer, `text`; `gold` is None where only the task's own code knows it."""

    kind: Literal["generation"] = field(default="generation", kw_only=True)
    task: str
    key: str
    text: str
    gold: str | None
    metrics: Mapping[str, float]
    samples: int = 1
    full_samples: int = 1

    def __post_init__(self) -> None:
        _check_finite(self, tuple(self.metrics.values()))
        _check_metrics(self, self.metrics)


Row = Annotated[Choices | Window | Generation, Field(discriminator="kind")]
RunRows = Mapping[str, Mapping[str, Sequence[Row]]]  # checkpoint -> task -> rows


def to_json(row: Row) -> dict:
    """A row as plain values, and for readers of the file what follows from them (choice, choice_norm)."""
    return asdict(row) | {name: getattr(row, name) for name in ("choice", "choice_norm") if hasattr(row, name)}


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """The metrics that every row has, the main one first; those without any denominator are left out."""
    names = [name for name in rows[0].parts if all(name in row.parts for row in rows)] if rows else []
    return [name for name in names if sum(row.parts[name][1] for row in rows) > 0]


def item_parts(rows: Sequence[Row], metric: str) -> dict[str, tuple[float, float]]:
    """Item key -> (numerator, denominator) of a metric."""
    return {row.key: row.parts[metric] for row in rows}


def _named(row: Row) -> str:
    return f"item '{row.key}' of task '{row.task}'"


def _check_metrics(row: Row, metrics: Mapping[str, float]) -> None:
    if not metrics:
        raise UserError(f"{_named(row)} has no metric that can be averaged: leave the task out")
    for name in metrics:
        metric_of(name)


def _check_finite(row: Row, values: Sequence[float]) -> None:
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise UserError(f"{_named(row)}: the model gives {wrong[0]}: set model.dtype to float32 or bfloat16")
