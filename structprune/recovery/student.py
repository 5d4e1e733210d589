"""The loss of a student as its forward pass, so that wrappers of a model (DDP, PEFT) see all of it.

Shapes: B rows, T tokens, M masked positions, m of a slice, C features, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from structprune.evaluation.masked import masked_positions
from structprune.models.encode import encode_rows, predicting
from structprune.models.logits import logit_slices
from structprune.models.modeling_structprune import DiffusionLM
from structprune.recovery.objectives import (
    cross_entropy,
    forward_kl,
    moving_target,
    streams_error,
    teacher_share,
    token_weights,
)
from structprune.recovery.settings import LossSettings
from structprune.recovery.teacher import Predictions

KINDS = 6  # tensors of the logits' size that exist at once: logits and log-probabilities of both, a target, a gradient


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a batch teaches.

    Attributes:
        predictions: of the teacher; None where only the text itself is learnt.
        progress: share of training done.
    """

    settings: LossSettings
    predictions: Predictions | None
    progress: float

    def nats(self, part: slice, logits: torch.Tensor, labels: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Both losses at some positions, weighted: (m, V), (m,), (m,) -> (m,).

        Args:
            part: of the batch's masked positions. p: their mask probabilities.
        """
        settings, logits, nats = self.settings, logits.float(), torch.zeros_like(p)  # (m, V), (m,)
        if self.predictions is not None:
            log_p, log_q = self.predictions.outcomes(part, logits, settings.temperature)  # (m, K) each
            if settings.teacher_share < 1 or settings.noisy_share > 0:
                share = teacher_share(self.progress, p, settings.teacher_share, settings.noisy_share)  # (m,)
                log_p = moving_target(log_p, log_q, share)  # (m, K)
            nats = nats + settings.kl * forward_kl(log_p, log_q, settings.temperature)
        if settings.cross_entropy > 0:
            nats = nats + settings.cross_entropy * cross_entropy(logits.log_softmax(-1), labels)
        return nats * token_weights(p, settings.weighting, settings.least_rate)


@contextmanager
def learning(student: DiffusionLM) -> Iterator[None]:
    """While open, the student's forward pass takes a noisy batch and a lesson, and returns the loss."""
    student.forward = partial(loss_of, student)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del student.forward


def loss_of(
    student: DiffusionLM, input_ids: torch.Tensor, noisy_ids: torch.Tensor, rate: torch.Tensor, lesson: Lesson
) -> dict[str, torch.Tensor]:
    """The weighted sum of both losses in nats per token of the batch, masked or not, and of the streams' error.

    The LM head runs on a slice of the masked positions at a time, and again in the backward pass: at a vocabulary of
    126k the logits of a batch would be most of the memory.

    Args:
        input_ids, noisy_ids: (B, T). rate: (B,) mask probabilities.
    """
    masked = masked_tokens(student, input_ids, noisy_ids)  # (B, T)
    streams = () if lesson.predictions is None else lesson.predictions.streams
    inputs: list[torch.Tensor] | None = [] if streams else None  # (B, S, C) of every block
    hidden = encode_rows(student, student.layout.rows(noisy_ids, input_ids), inputs)  # (B, S, C)
    row, source = predicting(student, masked)  # 2 x (M,), of the first T tokens of a row
    read, labels, p = hidden[row, source], input_ids[masked], rate[row]  # (M, C), (M,), (M,)

    def nats(part: slice, states: torch.Tensor) -> torch.Tensor:
        return lesson.nats(part, student.output_head(states), labels[part], p[part]).sum()

    total = hidden.new_zeros((), dtype=torch.float32) + 0 * hidden[:1, :1].float().sum()  # also without a masked token
    for part in logit_slices(len(read), student.output_head.weight.shape[0], KINDS):
        total = total + checkpoint(nats, part, read[part], use_reentrant=False)
    loss = total / noisy_ids.numel()
    if inputs:
        loss = loss + lesson.settings.streams * streams_error(inputs[1:], streams)
    return {"loss": loss}


def masked_tokens(model: DiffusionLM, input_ids: torch.Tensor, noisy_ids: torch.Tensor) -> torch.Tensor:
    """Where a token is to be predicted, (B, T) bool."""
    return masked_positions(input_ids, noisy_ids[:, None], model.config.mask_token_id)[:, 0]


@torch.no_grad()
def round_to(model: DiffusionLM, dtype: torch.dtype) -> None:
    """Give all weights values that `dtype` holds, in place; their own dtype stays."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
