"""Next tokens of text without noise, as a model that is causal too predicts them.

Shapes: N windows of T tokens, b of a batch, m of a slice, F figures, C features, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from structprune.evaluation.fidelity import KINDS, TOP, ReferencePredictions, kl_divergence, likeliest
from structprune.evaluation.masked import Measure
from structprune.models.encode import Batches
from structprune.models.logits import logit_slices
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device


@dataclass(frozen=True)
class NextTokens:
    """Figures of tokens 2 to T of every window, each predicted from the text before it, (N, T - 1) fp32 on CPU."""

    nats: torch.Tensor  # cross-entropy of the text
    kl: torch.Tensor  # KL(reference || model) in nats; 0 for the reference itself


@torch.inference_mode()
def next_token_figures(
    model: DiffusionLM, input_ids: torch.Tensor, measure: Measure, batches: Batches, kinds: int = 2
) -> torch.Tensor:
    """What `measure` finds at tokens 2 to T of every window: (N, T) int64 -> (N, T - 1, F) fp32 on CPU.

    Args:
        kinds: tensors of the logits' size that exist at once, those of `measure` among them.
    """
    (count, length), device = input_ids.shape, compute_device(model)

    def figures(rows: slice) -> torch.Tensor:
        ids, first = input_ids[rows].to(device), rows.start * (length - 1)  # (b, T)
        context = model.open_context(ids.shape, device, None, length)
        read = model.encode(ids, context=context)[:, :-1].flatten(0, 1)  # (b (T - 1), C)
        labels = ids[:, 1:].flatten()  # (b (T - 1),)
        columns = [
            measure(model.output_head(read[part]).float(), labels[part], slice(first + part.start, first + part.stop))
            for part in logit_slices(len(labels), model.embedding.weight.shape[0], kinds)
        ]  # (m, F) each
        return torch.cat(columns).view(len(ids), length - 1, -1).cpu()

    return batches.map(figures, count, length)


def causal_nats(model: DiffusionLM, input_ids: torch.Tensor, batches: Batches) -> torch.Tensor:
    """Mean nats of tokens 2 to T, each predicted from the text before it: (N, T) int64 -> (N,) fp32 on CPU."""
    return next_token_figures(model, input_ids, lambda logits, labels, _: _nats(logits, labels), batches).mean((1, 2))


def causal_reference(
    model: DiffusionLM, input_ids: torch.Tensor, batches: Batches, top: int = TOP
) -> tuple[ReferencePredictions, NextTokens]:
    """A model's predictions of next tokens, to compare other models with, and its own figures.

    Args:
        input_ids: (N, T) int64. top: likeliest tokens that are kept of a prediction, 8 bytes each.
    Returns:
        N (T - 1) predictions on CPU, and the figures.
    """
    count = input_ids[:, 1:].numel()
    predictions = ReferencePredictions.empty(count, top, model.output_head.weight.shape[0])

    def measure(logits: torch.Tensor, labels: torch.Tensor, places: slice) -> torch.Tensor:
        predictions.write(places, likeliest(logits, top))
        return _nats(logits, labels)  # (m, 1)

    nats = next_token_figures(model, input_ids, measure, batches, KINDS)[..., 0]  # (N, T - 1)
    return predictions, NextTokens(nats, torch.zeros_like(nats))


def causal_kl(
    model: DiffusionLM, input_ids: torch.Tensor, reference: ReferencePredictions, batches: Batches
) -> NextTokens:
    """A model's figures of next tokens beside a reference's predictions, `causal_reference`'s of the same windows."""

    def measure(logits: torch.Tensor, labels: torch.Tensor, places: slice) -> torch.Tensor:
        divergence = kl_divergence(reference.at(places, logits.device), logits)  # (m,)
        return torch.cat((_nats(logits, labels), divergence[:, None]), dim=-1)  # (m, 2)

    return NextTokens(*next_token_figures(model, input_ids, measure, batches, KINDS).unbind(-1))


def _nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy: (m, V), (m,) -> (m, 1)."""
    return F.cross_entropy(logits, labels, reduction="none")[:, None]
