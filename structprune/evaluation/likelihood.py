"""The nats of masked tokens, the costly half of a conditional log-likelihood (docs/methods.md section 6).

Shapes: N rows of T tokens, M masked positions, U different rows of a forward pass, C features, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from structprune.models.encode import Batches, encode_at
from structprune.models.logits import logit_slices
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device
from structprune.models.sampling_structprune import guided


@dataclass(frozen=True)
class MaskedRows:
    """Perturbed sequences of one length."""

    clean: torch.Tensor  # (N, T) int64, prompt and target
    masked: torch.Tensor  # (N, T) bool, where the target is masked
    prompt: torch.Tensor  # (N,) int64, tokens of the prompt, which guidance masks

    @classmethod
    def join(cls, parts: Sequence["MaskedRows"]) -> "MaskedRows":
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def __getitem__(self, rows: slice | torch.Tensor) -> "MaskedRows":
        return MaskedRows(self.clean[rows], self.masked[rows], self.prompt[rows])


@torch.inference_mode()
def token_nats(model: DiffusionLM, rows: MaskedRows, scale: float, batch: Batches) -> torch.Tensor:
    """Cross-entropy at the masked positions of every row, 0 elsewhere: (N, T) float64 on CPU.

    A sequence that several rows share (usually the branch without a prompt) runs once for all of them.

    Args:
        scale: s of classifier-free guidance, u + (1 + s)(c - u); at 0 the branch without a prompt does not run.
    """
    if not len(rows.clean):  # all masks of a round may have been run before
        return torch.zeros(rows.clean.shape, dtype=torch.float64)
    mask_id, layout = model.config.mask_token_id, model.layout
    noisy = layout.rows(rows.clean.masked_fill(rows.masked, mask_id), rows.clean)  # (N, S)
    length = noisy.shape[1]
    if not scale:
        return batch.map(lambda part: _batch_nats(model, [noisy[part]], rows[part], scale), len(noisy), length)
    text = rows.clean.masked_fill(torch.arange(rows.clean.shape[1]) < rows.prompt[:, None], mask_id)  # (N, T)
    bare = layout.rows(text.masked_fill(rows.masked, mask_id), text)  # (N, S)
    order = bare.unique(dim=0, return_inverse=True)[1].argsort(stable=True)  # (N,) equal rows side by side
    rows, noisy, bare = rows[order], noisy[order], bare[order]
    pairs = lambda part: _batch_nats(model, [noisy[part], bare[part]], rows[part], scale)  # noqa: E731
    nats = batch.map(pairs, len(noisy), length * 2)  # (N, T)
    return torch.empty_like(nats).index_copy_(0, order, nats)


def _batch_nats(model: DiffusionLM, branches: list[torch.Tensor], rows: MaskedRows, scale: float) -> torch.Tensor:
    """(n, S) ids of each branch -> (n, T) nats on CPU, in one forward pass of the different rows."""
    device = compute_device(model)
    ids, inverse = torch.cat(branches).unique(dim=0, return_inverse=True)  # (U, S), (branches·n,)
    masked = rows.masked  # (n, T)
    targets = torch.zeros(len(ids), masked.shape[1], dtype=torch.bool)  # (U, T)
    targets.index_put_((inverse,), masked.repeat(len(branches), 1), accumulate=True)
    slot = (targets.flatten().cumsum(0) - 1).view_as(targets)  # (U, T) index of each target's state
    context = model.layout.context(model, ids.shape, device)
    states = encode_at(model, ids.to(device), targets.to(device), context=context)  # (m, C)
    slots = [slot[chosen][masked].to(device) for chosen in inverse.chunk(len(branches))]  # (M,) per branch
    labels, head = rows.clean[masked].to(device), model.output_head  # (M,)
    nats = []
    for part in logit_slices(len(labels), head.weight.shape[0], len(branches)):
        logits = [head(states[chosen[part]]).float() for chosen in slots]  # (p, V) per branch
        joined = logits[0] if len(logits) == 1 else guided(logits[0], logits[1], scale)  # (p, V)
        nats.append(F.cross_entropy(joined, labels[part], reduction="none"))  # (p,)
    placed = torch.zeros(masked.shape, dtype=torch.float64)  # (n, T)
    if nats:
        placed[masked] = torch.cat(nats).double().cpu()
    return placed
