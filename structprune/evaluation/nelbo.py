"""Masked-diffusion NELBO per token, one estimator for every family (docs/methods.md section 6; arXiv 2502.09992)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from structprune.models.encode import Batches, encode_at
from structprune.models.logits import logit_slices
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device

OFFLOAD = "use a device with more memory, memory.offload=true, or shorter windows"  # where a pruning run checks itself


@dataclass(frozen=True)
class Nelbo:
    """Estimates per window, paired between models that saw the same noise."""

    nelbo: torch.Tensor  # (N,) nats per maskable token
    masked_nats: torch.Tensor  # (N,) cross-entropy summed over masked tokens
    masked_tokens: torch.Tensor  # (N,)

    @property
    def mean(self) -> float:
        return self.nelbo.double().mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over windows; 0 for a single window."""
        count = len(self.nelbo)
        return (self.nelbo.double().std().item() / count**0.5) if count > 1 else 0.0

    @property
    def cross_entropy(self) -> float:
        """Mean nats per masked token."""
        return (self.masked_nats.sum() / self.masked_tokens.sum().clamp(min=1)).item()


@torch.inference_mode()
def masked_nelbo(
    model: DiffusionLM,
    input_ids: torch.Tensor,
    noisy_ids: torch.Tensor,
    mask_probability: torch.Tensor,
    batch: int | Batches = 16,
    track: Callable[[Iterable], Iterable] = lambda items: items,
) -> Nelbo:
    """Σ_masked CE / p over the number of maskable positions, averaged over a window's noisy copies.

    The LM head runs at masked positions only: at a vocabulary of 126k it would be a large part of the cost.

    Args:
        input_ids: (N, T) int64 clean windows.
        noisy_ids: (N, S, T) int64 noisy copies.
        mask_probability: (N, S) the probability each was masked with.
        batch: noisy copies per forward pass (of a pruning run's check), or `Batches` that adapt to the memory.
        track: wraps the iteration over batches (progress).
    """
    count, copies, length = noisy_ids.shape
    device = compute_device(model)
    maskable = length - 2 if model.edges_visible else length
    noisy = noisy_ids.reshape(-1, length)  # (N*S, T)
    clean = input_ids.repeat_interleave(copies, dim=0)  # (N*S, T)
    weight = 1 / mask_probability.reshape(-1).float()  # (N*S,)
    nats, tokens = torch.zeros(count * copies), torch.zeros(count * copies)  # (N*S,)
    batches = Batches(batch * length, OFFLOAD) if isinstance(batch, int) else batch

    def measure(start: int, part: slice) -> torch.Tensor:
        rows = slice(start + part.start, start + part.stop)
        ids, labels = noisy[rows].to(device), clean[rows].to(device)  # (b, T)
        masked = (ids == model.config.mask_token_id) & (labels != ids)  # (b, T)
        return torch.stack((_masked_nats(model, ids, labels, masked), masked.sum(1).float().cpu()), dim=1)  # (b, 2)

    step = batches.rows(length)
    for start in track(range(0, len(noisy), step)):
        rows = slice(start, min(start + step, len(noisy)))
        columns = batches.map(partial(measure, rows.start), rows.stop - start, length)  # (b, 2)
        nats[rows], tokens[rows] = columns.unbind(1)  # 2 x (b,)
    estimate = (nats * weight / maskable).view(count, copies).mean(1)  # (N,)
    return Nelbo(estimate, nats.view(count, copies).sum(1), tokens.view(count, copies).sum(1))


def _masked_nats(model: DiffusionLM, ids: torch.Tensor, clean: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the masked positions of each row: (b, T) ids -> (b,) on CPU."""
    hidden, labels = encode_at(model, ids, masked), clean[masked]  # (M, C), (M,)
    nats = torch.zeros_like(ids, dtype=torch.float32)  # (b, T)
    losses = []
    for part in logit_slices(len(labels), model.embedding.weight.shape[0], kinds=2):  # logits, and normalised ones
        logits = model.output_head(hidden[part]).float()  # (m, V)
        losses.append(F.cross_entropy(logits, labels[part], reduction="none"))  # (m,)
    if losses:
        nats[masked] = torch.cat(losses)  # (M,)
    return nats.sum(1).cpu()
