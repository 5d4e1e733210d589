"""Losses of a pruned model (student) that learns from the dense one (teacher) at masked positions (docs/methods.md
section 7). Pure functions, in fp32.

Shapes: m masked positions, V vocabulary, K outcomes of a prediction (V, or the likeliest tokens and all others as one);
B rows, T tokens, C features of the residual stream.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

Weighting = Literal["uniform", "nelbo"]
HALF = 0.5  # mean mask probability, of times that are uniform over (0, 1)
LEAST_POWER = 1e-12  # of a dense stream, so that one of zeros divides nothing by zero


def log_predictions(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of every token at a temperature: (m, V) of any dtype -> (m, V) fp32."""
    return (logits.float() / temperature).log_softmax(-1)


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(p || q) in nats, times the square of the temperature at which both were computed, so that gradients keep their
    size (Hinton et al., arXiv 1503.02531).

    Args:
        log_p: (m, K) of the teacher, or a target made of it. log_q: (m, K) of the student.
    Returns:
        (m,); an outcome without probability under p adds nothing.
    """
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)  # (m, K)
    return terms.sum(-1) * temperature**2


def moving_target(log_p: torch.Tensor, log_q: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
    """Log of share · p + (1 - share) · q, a target between student and teacher through which no gradient flows.

    Args:
        log_p: (m, K) of the teacher. log_q: (m, K) of the student.
        share: the teacher's, 0 to 1; a number, or (m,).
    """
    share = torch.as_tensor(share, dtype=log_p.dtype, device=log_p.device)[..., None]  # (1,) or (m, 1)
    return torch.logaddexp(log_p + share.log(), log_q.detach() + (1 - share).log())


def teacher_share(progress: float, p: torch.Tensor, start: float, noisy: float) -> torch.Tensor:
    """The teacher's share of a moving target: it grows from `start` to 1 over training, and is smaller where much is
    masked, as the teacher knows less there (after TIDAL, arXiv 2604.26951).

    Args:
        progress: share of training done, 0 to 1.
        p: (m,) mask probabilities.
        noisy: how much of the share is lost at p = 1, 0 to 1; less and less over training.
    Returns:
        (m,) in [0, 1].
    """
    grown = start + (1 - start) * progress
    return grown * (1 - noisy * (1 - progress) * p)  # (m,)


def token_weights(p: torch.Tensor, weighting: Weighting, least: float) -> torch.Tensor:
    """Weight of every masked token, so that the sum over a row divided by its tokens is a loss per token.

    Divisors are constants, not counts: sums over processes and accumulated passes are then those of one pass.

    Args:
        p: (m,) mask probabilities.
        weighting: `uniform`: 2, as half of the tokens are masked on average; `nelbo`: 1 / p, as the bound has it.
        least: p below it counts as this.
    """
    if weighting == "uniform":
        return torch.full_like(p, 1 / HALF)
    return 1 / p.clamp(min=least)  # (m,)


def cross_entropy(log_q: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of the clean tokens: (m, V), (m,) int64 -> (m,)."""
    return F.nll_loss(log_q, labels, reduction="none")


def stream_error(student: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """How far the student's residual stream behind a block is from the dense one, in the size that the next norm reads:
    a stream of zeros has the error 1.

    Args:
        student, dense: (B, T, C) of any dtype.
    Returns:
        (B, T) fp32, mean square of the difference over the dense stream's mean square, token by token.
    """
    target = dense.float()  # (B, T, C)
    power = target.pow(2).mean(-1).clamp(min=LEAST_POWER)  # (B, T)
    return (student.float() - target).pow(2).mean(-1) / power


def streams_error(student: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of `stream_error` over tokens and blocks: n x (B, T, C) each -> a scalar.

    Args:
        dense: wherever they were computed; without gradients.
    """
    errors = [stream_error(own, theirs.to(own.device)).mean() for own, theirs in zip(student, dense, strict=True)]
    return torch.stack(errors).mean()


def stream_weights(masked: torch.Tensor, visible: float) -> torch.Tensor:
    """Weight of every token in the mean of `stream_error`, 1 on average, as half of the tokens are masked on average.

    Args:
        masked: (B, T) bool.
        visible: weight of a visible token where a masked one has 1.
    Returns:
        (B, T) fp32.
    """
    mean = HALF + (1 - HALF) * visible
    return torch.where(masked, 1.0, visible) / mean  # (B, T)
