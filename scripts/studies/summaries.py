"""What the summaries of studies share: rows of losses with what else was measured, and paired differences."""

from collections.abc import Iterable

from scripts.studies.studies import contrast_row, loss_row


def rows_and_gaps(
    variants: Iterable[str], contrasts: list[tuple[str, str]], ratios: Iterable[str], runs: dict, seeds: list[int]
) -> dict:
    """Mean losses and paired differences with 95% intervals over seeds, as plain data.

    Args:
        variants: their names. contrasts: (ours, theirs).
        runs: (variant, seed) -> a row of the study, with `ratios`.
    Returns:
        `losses`, whose rows also list over seeds whatever else a run has of that ratio, and `contrasts`.
    """
    rows, gaps, names = [], [], list(variants)
    for ratio in ratios:
        for name in names:
            results = [runs[name, seed]["ratios"][ratio] for seed in seeds]
            lists = {key: [each[key] for each in results] for key in results[0] if key != "loss"}
            rows.append({"variant": name, "ratio": ratio, **loss_row(runs, name, seeds, ratio), **lists})
        for name, base in contrasts:
            gap = contrast_row(runs, (name, ratio), (base, ratio), seeds)
            gaps.append({"variant": name, "against": base, "ratio": ratio, **gap})
    return {"losses": rows, "contrasts": gaps}
