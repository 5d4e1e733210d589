"""The loss of a student as its forward pass, so that wrappers of a model (DDP, PEFT) see all of it.

Shapes: B rows, T tokens, M masked positions, m of a slice, C features, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from structprune.evaluation.masked import masked_positions
from structprune.models.encode import encode_rows, next_tokens, predicting
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

    def nats(self, targets: "Targets", part: slice, logits: torch.Tensor) -> torch.Tensor:
        """Both losses at some of the targets, weighted: (m, V) logits -> (m,)."""
        settings, logits, p = self.settings, logits.float(), targets.rate[part]  # (m, V), (m,)
        nats, labels = torch.zeros_like(p), targets.labels[part]  # (m,) each
        if targets.predictions is not None:
            log_p, log_q = targets.predictions.outcomes(part, logits, settings.temperature)  # (m, K) each
            if settings.teacher_share < 1 or settings.noisy_share > 0:
                share = teacher_share(self.progress, p, settings.teacher_share, settings.noisy_share)  # (m,)
                log_p = moving_target(log_p, log_q, share)  # (m, K)
            nats = nats + settings.kl * forward_kl(log_p, log_q, settings.temperature)
        if settings.cross_entropy > 0:
            nats = nats + settings.cross_entropy * cross_entropy(logits.log_softmax(-1), labels)
        return nats * targets.weight[part]


@dataclass(frozen=True, eq=False)
class Targets:
    """Tokens of a batch that one use of the student predicts.

    Attributes:
        row, source: (M,) positions whose states predict them. labels: (M,) int64.
        rate: (M,) mask probabilities; 0 where nothing is masked. weight: (M,) of their losses.
        predictions: of the teacher; None where only the text itself is learnt.
    """

    row: torch.Tensor
    source: torch.Tensor
    labels: torch.Tensor
    rate: torch.Tensor
    weight: torch.Tensor
    predictions: Predictions | None


def masked_targets(
    student: DiffusionLM, ids: tuple[torch.Tensor, torch.Tensor], rate: torch.Tensor, lesson: Lesson
) -> Targets:
    """What block diffusion, or diffusion, predicts: clean and noisy ids (B, T) each, mask probabilities (B,)."""
    clean, settings, masked = ids[0], lesson.settings, masked_tokens(student, *ids)  # (B, T)
    row, source = predicting(student, masked)  # 2 x (M,), of the first T tokens of a row
    weight = token_weights(rate[row], settings.weighting, settings.least_rate)  # (M,)
    return Targets(row, source, clean[masked], rate[row], weight, lesson.predictions)


def causal_targets(student: DiffusionLM, clean: torch.Tensor, learnt: torch.Tensor | None, lesson: Lesson) -> Targets:
    """What the causal use predicts, tokens of the text from what precedes them: (B, T) ids.

    Args:
        learnt: (B, T) bool; None: all tokens.
    """
    learnt = torch.ones_like(clean, dtype=torch.bool) if learnt is None else learnt  # (B, T)
    row, source = next_tokens(student, learnt)  # 2 x (M,)
    rate = torch.zeros(len(row), device=clean.device)  # (M,)
    predictions = None if lesson.predictions is None else lesson.predictions.causal
    labels = clean[:, 1:][learnt[:, 1:]]  # (M,)
    return Targets(row, source, labels, rate, torch.full_like(rate, lesson.settings.causal or 0.0), predictions)


@contextmanager
def learning(student: DiffusionLM) -> Iterator[None]:
    """While open, the student's forward pass takes a noisy batch and a lesson, and returns the loss."""
    student.forward = partial(loss_of, student)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del student.forward


def loss_of(
    student: DiffusionLM,
    input_ids: torch.Tensor,
    noisy_ids: torch.Tensor,
    rate: torch.Tensor,
    lesson: Lesson,
    learnt: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The weighted sum of both losses in nats per token of the batch, masked or not, and of the streams' error; with
    `causal` in the lesson's settings also those of next tokens in the clean text.

    The LM head runs on a slice of the masked positions at a time, and again in the backward pass: at a vocabulary of
    126k the logits of a batch would be most of the memory.

    Args:
        input_ids, noisy_ids: (B, T). rate: (B,) mask probabilities.
        learnt: (B, T) bool, tokens of the text that are learnt; None: all.
    """
    streams = () if lesson.predictions is None else lesson.predictions.streams
    inputs: list[torch.Tensor] | None = [] if streams else None  # (B, S, C) of every block
    hidden = encode_rows(student, student.layout.rows(noisy_ids, input_ids), inputs)  # (B, S, C)
    uses = [masked_targets(student, (input_ids, noisy_ids), rate, lesson)]
    if lesson.settings.causal:
        uses.append(causal_targets(student, input_ids, learnt, lesson))

    def nats(targets: Targets, part: slice, states: torch.Tensor) -> torch.Tensor:
        return lesson.nats(targets, part, student.output_head(states)).sum()

    total = hidden.new_zeros((), dtype=torch.float32) + 0 * hidden[:1, :1].float().sum()  # also without a masked token
    for targets in uses:
        read = hidden[targets.row, targets.source]  # (M, C)
        for part in logit_slices(len(read), student.output_head.weight.shape[0], KINDS):
            total = total + checkpoint(nats, targets, part, read[part], use_reentrant=False)
    if not any(len(targets.row) for targets in uses):  # DDP waits for a gradient of the head too
        total = total + 0 * student.output_head(hidden[:1, 0]).float().sum()  # (1, V)
    loss = total / noisy_ids.numel()
    if inputs:
        loss = loss + lesson.settings.streams * streams_error(inputs[1:], streams)
    return {"loss": loss}


def masked_tokens(model: DiffusionLM, input_ids: torch.Tensor, noisy_ids: torch.Tensor) -> torch.Tensor:
    """Where a token is to be predicted, (B, T) bool."""
    return masked_positions(input_ids, noisy_ids[:, None], model.config.mask_token_id)[:, 0]


def learn_all(module: nn.Module) -> None:
    """Let all weights learn but those that no gradient reaches, which their modules name (`frozen`)."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            parameter.requires_grad_(name not in getattr(part, "frozen", ()))


@torch.no_grad()
def round_to(model: DiffusionLM, dtype: torch.dtype) -> None:
    """Give all weights values that `dtype` holds, in place; their own dtype stays."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
