"""Paired statistics of two models that saw the same noise."""

import torch


def paired_difference(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """Mean of ours - theirs over pairs, its standard error, and a 95% normal interval.

    Args:
        ours, theirs: (N,) values of the same windows under the same noise.
    Returns:
        `mean`, `standard_error`, `low`, `high`, all in the unit of the values; of a single pair all but the mean are
        None.
    """
    gap = ours.double() - theirs.double()  # (N,)
    mean = gap.mean().item()
    if len(gap) < 2:
        return {"mean": mean, "standard_error": None, "low": None, "high": None}
    error = gap.std().item() / len(gap) ** 0.5
    return {"mean": mean, "standard_error": error, "low": mean - 1.96 * error, "high": mean + 1.96 * error}
