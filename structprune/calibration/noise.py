"""The forward process of masked diffusion LMs: mask probabilities and noisy copies (docs/methods.md section 2).

Papers: LLaDA arXiv 2502.09992, Dream arXiv 2508.15487. Shapes: N windows, S noise levels, c copies of one, T tokens.
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


def check_copies(copies: int | None, levels: int) -> None:
    """Raise UserError for more copies of a window than there are noise levels to deal."""
    if copies is not None and copies > levels:
        raise UserError(
            f"calibration.copies = {copies} exceeds the number of noise levels, {levels}: lower it, or"
            " calibration.interval"
        )


def stratified_times(count: int, generator: torch.Generator) -> torch.Tensor:
    """t_k = (u + k / count) mod 1 with one u ~ U(0, 1): (count,) float64, exactly one in each of `count` strata."""
    shift = torch.rand(1, generator=generator, dtype=torch.float64)  # (1,)
    return (shift + torch.arange(count).double() / count) % 1  # (count,)


def deal_levels(windows: int, levels: int, copies: int, generator: torch.Generator) -> torch.Tensor:
    """Which of S ordered noise levels each window is seen at, where it is not seen at all: (N, c) int64, ascending.

    A window's levels are distinct and spread evenly, S / c apart on average. Over all windows, no level occurs more
    than once more than another; which windows get which is random.
    """
    draws = windows * copies
    # all draws in the order of their level; a random start, so that no level is dealt more often than others on average
    start = torch.randint(levels, (1,), generator=generator)  # (1,)
    ordered = (torch.arange(draws) * levels + start) // draws  # (c * N,)
    # every N-th draw makes a window: those lie S / c >= 1 levels apart, and so differ
    return ordered.view(copies, windows).T[torch.randperm(windows, generator=generator)]  # (N, c)


def window_times(
    windows: int, schedule: Schedule, times: torch.Tensor, generator: torch.Generator, copies: int | None = None
) -> torch.Tensor:
    """Times of the noisy copies of N windows: (N, S) float64, or (N, c) with c `copies` of each.

    Args:
        schedule: "levels" (LLaDA: every window at the S ordered `times`, or at c of them by `deal_levels`) or "uniform"
            (Dream: in each of S copies, the times of the N windows are stratified over (0, 1) around one random shift;
            or all N c times are stratified together, and a window's lie 1 / c apart).
        times: (S,) of `level_times`; for "uniform" only their number counts, and not beside `copies`.
    Raises:
        ValueError: unknown schedule.
    """
    if schedule not in ("levels", "uniform"):
        raise ValueError(f"schedule must be 'levels' or 'uniform', not '{schedule}'")
    if schedule == "levels":
        if copies is None:
            return times.expand(windows, -1)  # (N, S)
        return times[deal_levels(windows, len(times), copies, generator)]  # (N, c)
    if copies is None:
        return torch.stack([stratified_times(windows, generator) for _ in times], dim=1)  # (N, S)
    ordered = stratified_times(windows * copies, generator)  # (c * N,)
    return ordered.view(copies, windows).T[torch.randperm(windows, generator=generator)]  # (N, c)


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
    """S noisy copies of every window, on CPU.

    Args:
        input_ids: (N, T) int64.
        schedule, times: as for `window_times`.
    Returns:
        noisy ids (N, S, T) int64 and the mask probabilities (N, S) float32.
    Raises:
        ValueError: unknown schedule.
    """
    p = mask_rate(window_times(len(input_ids), schedule, times, generator))  # (N, S)
    return apply_mask(input_ids, p, mask_id, generator, edges_visible), p


def seeded(seed: int, stream: int) -> torch.Generator:
    """Independent generators of one seed: stream 0 draws windows, 1 noise; no two seeds share a stream."""
    return torch.Generator().manual_seed((2 * seed + stream) % 2**63)


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
