"""The figures that tasks are summarised by."""

from dataclasses import dataclass, replace

from structprune.errors import UserError, nearest


@dataclass(frozen=True)
class Metric:
    """A figure of a task: the sum of its items' numerators over the sum of their denominators."""

    name: str
    higher_is_better: bool
    proportion: bool  # whether items are right or wrong (1 or 0 over 1) rather than real numbers
    unit: str = "nats"
    relative: bool = False  # to the reference, which has no value of its own


METRICS = {
    metric.name: metric
    for metric in (
        Metric("acc", higher_is_better=True, proportion=True, unit="%"),
        Metric("acc_norm", higher_is_better=True, proportion=True, unit="%"),
        Metric("exact_match", higher_is_better=True, proportion=True, unit="%"),
        Metric("nelbo", higher_is_better=False, proportion=False),
        Metric("masked_ce", higher_is_better=False, proportion=False),
        Metric("causal_ce", higher_is_better=False, proportion=False),
        Metric("masked_acc", higher_is_better=True, proportion=False, unit="%"),
        Metric("kl", higher_is_better=False, proportion=False, relative=True),
        Metric("agreement", higher_is_better=True, proportion=False, unit="%", relative=True),
        Metric("distinct", higher_is_better=True, proportion=False, unit="%"),
        Metric("kept", higher_is_better=True, proportion=False, unit="%", relative=True),
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
