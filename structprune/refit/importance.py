"""How much each position of the calibration rows matters to a refit (docs/methods.md section 5, "Row importance").

Shapes: R sequences of T tokens, b of a pass, M masked tokens, C features, V vocabulary.
"""

import torch

from structprune.config.refit import Weighting
from structprune.models.adapter import CONSUMER, UnitKey
from structprune.models.encode import encode_at
from structprune.models.logits import logit_slices
from structprune.models.transfer import send
from structprune.statistics.gradients import gradient_norms
from structprune.statistics.pass_parts import rows_digest
from structprune.statistics.rows import Rows, kept_rows
from structprune.statistics.scan import Scan
from structprune.workers import ALONE, Workers

Importance = dict[UnitKey | None, torch.Tensor]
"""Importance (R, T) fp32 with mean 1 over the positions that it tells apart; by consumer, or under None for all."""


def importance(scan: Scan, rows: Rows, weighting: Weighting) -> Importance:
    """The importance of every position of the fitted rows; empty where all count alike.

    Args:
        scan: of the dense model, over the fitted windows.
        rows: its rows on an arm with masked tokens.
    """
    if weighting == "uniform":
        return {}
    shifted, p = scan.adapter.model.shifted, scan.calibration.mask_probability
    if weighting == "certainty":
        (values,) = kept_rows(scan, rows, "certainties", lambda: [certainties(scan, rows)])  # (R, T)
        return {None: at_predictions(values, rows.masked, shifted, scan.workers)}
    assert p is not None, "a loss needs mask probabilities"
    if weighting == "noise":
        values = noise_importance(p.flatten(), rows.masked, rows.ids.shape[1] // scan.layout.copies)  # (R, T)
        return {None: at_predictions(values, rows.masked, shifted, scan.workers)}
    consumers = {
        (block.index, kind): block[CONSUMER[kind]] for block in scan.adapter.blocks for kind in block.kinds
    }  # fmt: skip
    weights = "ones" if rows.weight is None else rows_digest(scan.workers, rows.weight)
    name, linears = f"gradients-{weights}", list(consumers.values())
    norms = kept_rows(scan, rows, name, lambda: gradient_norms(scan, rows, linears))  # (R, T) each
    return {key: norm / mean_over_all(norm, scan.workers) for key, norm in zip(consumers, norms)}


def noise_importance(p: torch.Tensor, masked: torch.Tensor, window: int) -> torch.Tensor:
    """1 / p at masked tokens, the weight of their cross-entropy in NELBO; p is at least one token of a window.

    Args:
        p: (R,) mask probability of every sequence. masked: (R, T) bool. window: tokens of which some are masked; a row
            may hold their clean text too.
    Returns:
        (R, T) fp32, 0 at visible tokens.
    """
    return masked / p.clamp(min=1 / window)[:, None]  # (R, T)


@torch.inference_mode()
def certainties(scan: Scan, rows: Rows) -> torch.Tensor:
    """The dense model's probability of its likeliest token at every masked one: (R, T) fp32, 0 at visible tokens."""
    model, batch = scan.adapter.model, scan.sequences(rows.copies)
    values = torch.zeros(rows.ids.shape)  # (R, T)
    for start in scan.track(range(0, len(rows.ids), batch), "certainties"):
        part = slice(start, start + batch)
        masked = rows.masked[part]  # (b, T)
        ids, targets = (send(each, scan.adapter.device) for each in (rows.ids[part], masked))
        hidden = encode_at(model, ids, targets, context=scan.adapter.context(ids.shape))  # (M, C)
        slices = logit_slices(len(hidden), model.output_head.weight.shape[0], kinds=2)
        if slices:
            likeliest = [model.output_head(hidden[each]).float().softmax(-1).amax(-1) for each in slices]  # (m,) each
            values[part][masked] = torch.cat(likeliest).cpu()
    return values


def mean_over_all(own: torch.Tensor, workers: Workers) -> torch.Tensor:
    """The mean of the values (n,) or (R, T) of all processes, () at least the smallest normal number; NaN of none."""
    sums = torch.tensor([float(own.sum(dtype=torch.float64)), own.numel()], dtype=torch.float64)  # (2,)
    workers.add_up(sums)
    return (sums[0] / sums[1]).to(own.dtype).clamp(min=torch.finfo(own.dtype).tiny)


def at_predictions(values: torch.Tensor, masked: torch.Tensor, shifted: bool, workers: Workers = ALONE) -> torch.Tensor:
    """Values at masked tokens, moved to the positions that predict them and scaled to a mean of 1 there; 1 elsewhere.

    Args:
        values: (R, T) fp32, 0 at visible tokens. masked: (R, T) bool.
        shifted: whether the position before a token predicts it (the first token is predicted from its own).
    Returns:
        (R, T) fp32.
    """
    places = predicted_at(masked, shifted)  # (R, T)
    if shifted:
        first = values[:, :1]  # (R, 1)
        values = torch.cat((values[:, 1:], torch.zeros_like(first)), dim=1)  # (R, T)
        values[:, :1] = torch.maximum(values[:, :1], first)
    mean = mean_over_all(values[places], workers)  # ()
    return torch.where(places, values / mean, 1.0)  # (R, T)


def predicted_at(masked: torch.Tensor, shifted: bool) -> torch.Tensor:
    """The positions that predict masked tokens, (R, T) bool: their own, or the ones before where a model is shifted."""
    if not shifted:
        return masked
    positions = torch.cat((masked[:, 1:], torch.zeros_like(masked[:, :1])), dim=1)  # (R, T)
    positions[:, 0] |= masked[:, 0]  # the first token is predicted from its own position
    return positions
