"""What a run for masks is asked for: checked before any forward pass."""

from structprune.calibration.noise import level_times
from structprune.calibration.trajectories import check_trajectory
from structprune.config import Config
from structprune.config.effects import check_masking
from structprune.errors import UserError
from structprune.masking.allocate import block_ratios
from structprune.masking.patterns import check_pattern, parse_nm
from structprune.masking.rows import reads_text
from structprune.masking.scores.table import resolve_score
from structprune.models.adapter import Adapter
from structprune.models.modeling_structprune import DiffusionLM


def removed_ratio(config: Config) -> float:
    """The removed share of every projection that a configuration asks for.

    Raises:
        UserError: N:M with another ratio than N / M.
    """
    asked = config.masking.ratio
    if config.method != "nm":
        return 0.5 if asked is None else asked
    removed, group = parse_nm(config.masking.nm)
    if asked not in (None, removed / group):
        ratio = f"masking.ratio = {asked} contradicts masking.nm = {config.masking.nm}"
        raise UserError(f"{ratio}, which removes {removed / group:g}: leave it out (null), or use method unstructured")
    return removed / group


def check_mask_request(model: DiffusionLM, config: Config) -> tuple[str, str | None]:
    """Raise what a run would fail on later, before any forward pass; model may be on the meta device.

    Returns:
        The score without its `sink-`, and the arm it runs on.
    Raises:
        UserError: the first choice that cannot be met or has no effect.
    """
    if config.method == "structured":
        raise UserError("method = structured makes no masks: set it to unstructured or nm")
    base, arm = resolve_score(config.masking.score, config.masking.arm)
    check_masking(config, base, arm, reads_text(config, arm))
    ratio = removed_ratio(config)
    if config.method == "nm":
        check_pattern(Adapter(model).blocks, config.masking.nm)
        if config.masking.allocation != "uniform":
            asked = f"masking.allocation = {config.masking.allocation}"
            raise UserError(f"{asked} varies the ratio over blocks, which N:M fixes at {ratio:g}: use uniform")
    if config.masking.allocation != "owl":  # which the activations decide
        block_ratios(config.masking, ratio, block_sizes(Adapter(model)), None)
    calibration = config.calibration
    if config.reconstruct.enabled and calibration.held_out < 1 and not calibration.replays:
        raise UserError(
            "calibration.held_out = 0 leaves nothing to choose the refit's damping on: set it, or"
            " reconstruct.enabled = false"
        )
    if reads_text(config, arm) and not calibration.replays:
        level_times(calibration.steps, calibration.interval)
        check_trajectory(config)
    return base, arm


def block_sizes(adapter: Adapter) -> list[int]:
    """Weights of the seven projections of every block."""
    return [sum(block[role].weight.numel() for role in block.names) for block in adapter.blocks]
