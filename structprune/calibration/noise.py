"""The forward process of masked diffusion LMs: mask probabilities and noisy copies (docs/methods.md section 2).

Papers: LLaDA arXiv 2502.09992, Dream arXiv 2508.15487. Shapes: N windows, S noise levels, T tokens.
"""

import torch

from structprune.errors import UserError
from structprune.models.family import Schedule
from structprune.models.noising import mask_rate


def level_times(steps: int = 50, interval: int = 5) -> torch.Tensor:
    """LLaDA's ordered times t = s / N at s = interval, 2 interval, ...: (S,) float64, S = steps // interval.

    Raises:
        UserError: the interval is longer than the trajectory, which leaves no level.
    """
    if not 1 <= interval <= steps:
        raise UserError(
            f"calibration.interval = {interval} leaves no noise level: choose 1 to calibration.steps = {steps}"
        )
    return torch.arange(interval, steps + 1, interval).double() / steps  # (S,)


def stratified_times(count: int, generator: torch.Generator) -> torch.Tensor:
    """t_k = (u + k / count) mod 1 with one u ~ U(0, 1): (count,) float64, exactly one in each of `count` strata."""
    shift = torch.rand(1, generator=generator, dtype=torch.float64)  # (1,)
    return (shift + torch.arange(count).double() / count) % 1  # (count,)


def apply_mask(
    input_ids: torch.Tensor,
    mask_probability: torch.Tensor,
    mask_id: int,
    generator: torch.Generator,
    edges_visible: bool = False,
) -> torch.Tensor:
    """Replace every token by `mask_id` independently with its copy's probability: (N, T), (N, S) -> (N, S, T) int64.

    Args:
        edges_visible: never mask positions 0 and T-1 (Dream).
    """
    shape = (*mask_probability.shape, input_ids.shape[1])
    masked = torch.rand(shape, generator=generator) < mask_probability[..., None]  # (N, S, T)
    if edges_visible:
        masked[..., 0] = masked[..., -1] = False
    return torch.where(masked, mask_id, input_ids[:, None])  # (N, S, T)


def noise_windows(
    input_ids: torch.Tensor,
    mask_id: int,
    schedule: Schedule,
    generator: torch.Generator,
    times: torch.Tensor,
    edges_visible: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy copies of every window, on CPU.

    Args:
        input_ids: (N, T) int64.
        schedule: "levels" (LLaDA: every window at the S ordered `times`) or "uniform" (Dream: S independent copies; in
            each, the times of the N windows are stratified over (0, 1) around one random shift).
        times: (S,) of `level_times`; for "uniform" only their number counts.
    Returns:
        noisy ids (N, S, T) int64 and the mask probabilities (N, S) float32.
    Raises:
        ValueError: unknown schedule.
    """
    if schedule not in ("levels", "uniform"):
        raise ValueError(f"schedule must be 'levels' or 'uniform', not '{schedule}'")
    if schedule == "levels":
        t = times.expand(len(input_ids), -1)  # (N, S)
    else:
        t = torch.stack([stratified_times(len(input_ids), generator) for _ in times], dim=1)  # (N, S)
    p = mask_rate(t)  # (N, S)
    return apply_mask(input_ids, p, mask_id, generator, edges_visible), p


def stratified_noise(
    input_ids: torch.Tensor,
    mask_id: int,
    generator: torch.Generator,
    samples: int = 1,
    edges_visible: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise for evaluation: times stratified over (0, 1) over all N x samples draws, in a random order.

    Args:
        input_ids: (N, T) int64, on CPU.
    Returns:
        noisy ids (N, samples, T) int64 and the mask probabilities (N, samples) float32.
    """
    draws = len(input_ids) * samples
    t = stratified_times(draws, generator)[torch.randperm(draws, generator=generator)]  # (N * S,)
    p = mask_rate(t).view(len(input_ids), samples)  # (N, S)
    return apply_mask(input_ids, p, mask_id, generator, edges_visible), p
