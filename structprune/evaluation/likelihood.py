"""Rows with masks -> nats, the costly half of a conditional log-likelihood (docs/methods.md section 6).

Shapes: N rows of T tokens, M masked positions, U different rows of a forward pass, C features, V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import Sequence

import torch
import torch.nn.functional as F

from structprune.generation.sampling import guided
from structprune.models.encode import Batches, encode_at
from structprune.models.logits import logit_slices
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device


@dataclass(frozen=True)
class Rows:
    """Perturbed sequences of one length.

    Attributes:
        clean: (N, T) int64, prompt and target.
        masked: (N, T) bool, where the target is masked.
        prompt: (N,) int64, tokens of the prompt, which guidance masks.
    """

    clean: torch.Tensor
    masked: torch.Tensor
    prompt: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence["Rows"]) -> "Rows":
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def __getitem__(self, rows) -> "Rows":
        return Rows(self.clean[rows], self.masked[rows], self.prompt[rows])


@torch.inference_mode()
def token_nats(model: DiffusionLM, rows: Rows, scale: float, batch: Batches) -> torch.Tensor:
    """Cross-entropy at the masked positions of every row, 0 at the others: (N, T) float64 on CPU.

    A sequence that several rows have in common (the branch without a prompt, most of all) is run once for all of
    them.

    Args:
        scale: s of classifier-free guidance, u + (1 + s)(c - u); 0 runs no branch without a prompt.
    """
    if not len(rows.clean):  # all patterns of a round may be known
        return torch.zeros(rows.clean.shape, dtype=torch.float64)
    mask_id, device = model.config.mask_token_id, compute_device(model)
    noisy = rows.clean.masked_fill(rows.masked, mask_id)  # (N, T)
    length = noisy.shape[1]
    bare = None
    if scale:
        bare = noisy.masked_fill(torch.arange(length) < rows.prompt[:, None], mask_id)  # (N, T)
        order = bare.unique(dim=0, return_inverse=True)[1].argsort(stable=True)  # (N,) so that equal rows meet
        rows, noisy, bare = rows[order], noisy[order], bare[order]

    def nats(part: slice) -> torch.Tensor:
        branches = [noisy[part]] if bare is None else [noisy[part], bare[part]]
        return _batch_nats(model, branches, rows[part], scale, device)

    found = batch.map(nats, len(noisy), length * (2 if scale else 1))  # (N, T)
    return found if bare is None else torch.empty_like(found).index_copy_(0, order, found)


def _batch_nats(model, branches: list[torch.Tensor], rows: Rows, scale: float, device) -> torch.Tensor:
    """(n, T) ids of each branch -> (n, T) nats on CPU, in one forward pass of the different rows."""
    ids, inverse = torch.cat(branches).unique(dim=0, return_inverse=True)  # (U, T), (branches·n,)
    masked = rows.masked  # (n, T)
    wanted = torch.zeros_like(ids, dtype=torch.bool)  # (U, T)
    wanted.index_put_((inverse,), masked.repeat(len(branches), 1), accumulate=True)
    slot = (wanted.flatten().cumsum(0) - 1).view_as(ids)  # (U, T) where a position's state is
    states = encode_at(model, ids.to(device), wanted.to(device))  # (m, C)
    slots = [slot[chosen][masked].to(device) for chosen in inverse.chunk(len(branches))]  # (M,) per branch
    labels, head = rows.clean[masked].to(device), model.output_head  # (M,)
    nats = []
    for part in logit_slices(len(labels), head.weight.shape[0], len(branches)):
        logits = [head(states[chosen[part]]).float() for chosen in slots]  # (p, V) per branch
        joined = guided(*logits, scale) if len(branches) == 2 else logits[0]  # (p, V)
        nats.append(F.cross_entropy(joined, labels[part], reduction="none"))  # (p,)
    placed = torch.zeros(masked.shape, dtype=torch.float64)  # (n, T)
    if nats:
        placed[masked] = torch.cat(nats).double().cpu()
    return placed
