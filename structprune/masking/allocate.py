"""How the ratio is spread over blocks: uniform, by outliers (OWL, arXiv 2310.05175), or linear in depth."""

import torch

from structprune.config import MaskingSettings
from structprune.errors import UserError
from structprune.structured.allocate import depth_ratios


def outlier_share(scores: list[torch.Tensor], threshold: float) -> float:
    """Share of a block's Wanda scores that exceed `threshold` times their mean over the block; any shapes.

    Scores of all projections are pooled, as published. `masking.relative` does not mix scales: what is added to the
    residual stream is then measured by the stream's RMS, as what comes out of its norms always is.
    """
    count = sum(score.numel() for score in scores)
    mean = sum(score.double().sum().item() for score in scores) / count
    return sum((score > threshold * mean).sum().item() for score in scores) / count


def owl_ratios(outliers: list[float], ratio: float, spread: float) -> list[float]:
    """Removed ratio of every block, falling with its share of outliers; mean `ratio`, range 2 |spread|.

    Args:
        outliers: share of outliers in every block.
        spread: λ; negative turns the order round. Blocks that do not differ all get `ratio`.
    """
    low, high = min(outliers), max(outliers)
    if high == low:
        return [ratio] * len(outliers)
    offsets = [2 * spread * (share - low) / (high - low) for share in outliers]
    mean = sum(offsets) / len(offsets)
    return [ratio + mean - offset for offset in offsets]


def block_ratios(
    settings: MaskingSettings, ratio: float, sizes: list[int], outliers: list[float] | None
) -> list[float]:
    """The removed ratio of every block; over all weights, `sizes` of them in each, it is `ratio`.

    Args:
        outliers: share of them in every block, for `owl`.
    Raises:
        UserError: a block's ratio would leave [0, 1).
    """
    if settings.allocation == "uniform":
        return [ratio] * len(sizes)
    if settings.allocation == "depth":
        ratios, key = depth_ratios(len(sizes), ratio, settings.depth_slope), "depth_slope"
    else:
        assert outliers is not None, "owl reads outliers"
        ratios, key = owl_ratios(outliers, ratio, settings.owl_spread), "owl_spread"
    met = sum(size * value for size, value in zip(sizes, ratios)) / sum(sizes)
    # blocks may differ in size, after a structured run; rounded, so that 0.25 - 1e-17 removes a quarter of a row
    ratios = [round(value + ratio - met, 12) for value in ratios]
    for index, value in enumerate(ratios):
        if not 0 <= value < 1:
            setting = f"masking.{key} = {getattr(settings, key)}"
            raise UserError(f"{setting} gives block {index} the ratio {value:.3f} at {ratio}: bring it nearer to 0")
    return ratios
