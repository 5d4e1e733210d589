"""Masked-diffusion NELBO per token, one estimator for every family (docs/methods.md section 6; arXiv 2502.09992)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from structprune.evaluation.causal import causal_nats
from structprune.evaluation.masked import OFFLOAD, masked_sums
from structprune.models.encode import Batches
from structprune.models.modeling_structprune import DiffusionLM


@dataclass(frozen=True)
class Nelbo:
    """Estimates per window, paired between models that saw the same noise."""

    nelbo: torch.Tensor  # (N,) nats per maskable token
    masked_nats: torch.Tensor  # (N,) cross-entropy summed over masked tokens
    masked_tokens: torch.Tensor  # (N,)
    causal: torch.Tensor | None = None  # (N,) mean nats of the next token; None of models that are not causal too

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

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


def masked_nelbo(
    model: DiffusionLM,
    input_ids: torch.Tensor,
    noisy_ids: torch.Tensor,
    mask_probability: torch.Tensor,
    batch: int | Batches = 16,
    track: Callable[[Iterable], Iterable] = lambda items: items,
) -> Nelbo:
    """Σ_masked CE / p over the number of maskable positions, averaged over a window's noisy copies.

    Args:
        input_ids: (N, T) int64 clean windows.
        noisy_ids: (N, S, T) int64 noisy copies.
        mask_probability: (N, S) the probability each was masked with.
        batch, track: as for `masked_sums`.
    """
    sums = masked_sums(model, (input_ids, noisy_ids), _cross_entropy, batch, track)  # (N, S, 2)
    tokens, nats = sums.unbind(2)  # 2 x (N, S)
    estimate = nelbo_of(nats, tokens, mask_probability, maskable_tokens(model, input_ids.shape[1]))
    return with_next_tokens(estimate, model, input_ids, batch)


def with_next_tokens(estimate: Nelbo, model: DiffusionLM, input_ids: torch.Tensor, batch: int | Batches) -> Nelbo:
    """The estimate with what the next token costs, of a model that is causal too; arguments as `masked_nelbo`."""
    if not model.layout.causal:
        return estimate
    batches = Batches(batch * input_ids.shape[1], OFFLOAD) if isinstance(batch, int) else batch
    return replace(estimate, causal=causal_nats(model, input_ids, batches))


def maskable_tokens(model: DiffusionLM, length: int) -> int:
    """Tokens of a window that noise can mask."""
    return length - 2 if model.edges_visible else length


def nelbo_of(nats: torch.Tensor, tokens: torch.Tensor, mask_probability: torch.Tensor, maskable: int) -> Nelbo:
    """The estimate from cross-entropies summed over the masked tokens of noisy copies.

    Args:
        nats, tokens, mask_probability: (N, S) each, of every copy.
        maskable: positions of a window that noise could have masked.
    """
    weight = 1 / mask_probability.float()  # (N, S)
    estimate = (nats * weight / maskable).mean(1)  # (N,)
    return Nelbo(estimate, nats.sum(1), tokens.sum(1))


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, _: slice) -> torch.Tensor:
    """(m, V), (m,) -> (m, 1) nats."""
    return F.cross_entropy(logits, labels, reduction="none")[:, None]  # (m, 1)
