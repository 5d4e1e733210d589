"""A model's predictions of masked tokens, slice by slice: the one walk that NELBO and fidelity share.

Shapes: N windows, S noisy copies, T tokens, b rows of a batch, M masked positions, m of a slice, F figures, C features,
V vocabulary.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch

from structprune.models.encode import Batches, encode_noisy
from structprune.models.logits import logit_slices
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device

OFFLOAD = "use a device with more memory, memory.offload=true, or shorter windows"  # where a pruning run checks itself

# (m, V) fp32 logits, (m,) clean tokens, and their places among all masked positions -> (m, F) fp32 figures.
# It is called again for the same places where a batch did not fit the memory.
Measure = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]


def masked_positions(input_ids: torch.Tensor, noisy_ids: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Where a token is to be predicted; a mask token of the text itself is not: (N, T), (N, S, T) -> (N, S, T) bool."""
    return (noisy_ids == mask_id) & (input_ids[:, None] != noisy_ids)


@torch.inference_mode()
def masked_sums(
    model: DiffusionLM,
    windows: tuple[torch.Tensor, torch.Tensor],
    measure: Measure,
    batch: int | Batches = 16,
    track: Callable[[Iterable], Iterable] = lambda items: items,
    kinds: int = 2,
) -> torch.Tensor:
    """What `measure` finds at masked positions, summed over every noisy copy.

    The LM head runs at masked positions only: at a vocabulary of 126k it would be a large part of the cost.

    Args:
        windows: (N, T) int64 clean ids, and (N, S, T) int64 noisy copies.
        batch: noisy copies per forward pass (of a pruning run's check), or `Batches` that adapt to the memory.
        track: wraps the iteration over batches (progress).
        kinds: tensors of the logits' size that exist at once, those of `measure` among them.
    Returns:
        (N, S, 1 + F) fp32 on CPU: the number of masked tokens, and the sums.
    """
    input_ids, noisy_ids = windows
    count, copies, length = noisy_ids.shape
    masked = masked_positions(input_ids, noisy_ids, model.config.mask_token_id).view(-1, length)  # (N*S, T)
    noisy, clean = noisy_ids.reshape(-1, length), input_ids.repeat_interleave(copies, dim=0)  # (N*S, T) each
    ends = masked.sum(1).cumsum(0)  # (N*S,) masked positions up to and with a copy
    firsts = [0, *ends.tolist()]
    size, device = length * model.layout.copies, compute_device(model)  # tokens of a row
    batches = Batches(batch * size, OFFLOAD) if isinstance(batch, int) else batch

    def sums(start: int, part: slice) -> torch.Tensor:
        rows = slice(start + part.start, start + part.stop)
        ids = (each[rows].to(device) for each in (noisy, clean, masked))  # 3 x (b, T)
        return _row_sums(model, tuple(ids), measure, firsts[rows.start], kinds)

    step, parts = batches.rows(size), []
    for start in track(range(0, len(noisy), step)):
        parts.append(batches.map(partial(sums, start), min(step, len(noisy) - start), size))  # (b, 1 + F)
    return torch.cat(parts).view(count, copies, -1)


def _row_sums(
    model: DiffusionLM, rows: tuple[torch.Tensor, ...], measure: Measure, first: int, kinds: int
) -> torch.Tensor:
    """One forward pass: noisy and clean ids and where they differ, (b, T) each -> (b, 1 + F) on CPU.

    Args:
        first: masked positions before these rows.
    """
    ids, clean, masked = rows
    hidden, labels = encode_noisy(model, ids, clean, masked), clean[masked]  # (M, C), (M,)
    figures = []
    for part in logit_slices(len(labels), model.embedding.weight.shape[0], kinds) or [slice(0, 0)]:
        logits = model.output_head(hidden[part]).float()  # (m, V)
        figures.append(measure(logits, labels[part], slice(first + part.start, first + part.stop)))  # (m, F)
    columns = torch.cat(figures).T  # (F, M)
    spread = torch.zeros(len(columns), *ids.shape, device=ids.device)  # (F, b, T)
    spread[:, masked] = columns
    return torch.cat((masked.sum(1).float()[None], spread.sum(2))).T.cpu()
