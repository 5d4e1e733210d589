"""Plans put together from a library of levels and measured on the dense model's predictions, without a new model.

A plan differs from the current one in a few blocks. Its forward pass starts before the first of them, from the current
plan's residual stream. Removed units stay in place with consumers that do not read them.
Shapes: N windows of T tokens, S noisy copies, b rows of a batch, C features, M masked positions.
"""

import math
from dataclasses import dataclass

import torch

from structprune.evaluation.fidelity import ReferencePredictions, kl_divergence
from structprune.evaluation.masked import masked_positions
from structprune.levels.build import set_level
from structprune.levels.library import Library
from structprune.models.adapter import CONSUMER, Adapter, UnitKey
from structprune.models.encode import encode_from
from structprune.models.logits import logit_slices
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device
from structprune.statistics.hidden import empty_on_host
from structprune.statistics.scan import Limits
from structprune.structured.allocate import Counts
from structprune.workers import ALONE, Workers

KINDS = 3  # tensors of the logits' size that a divergence needs at once


@dataclass(frozen=True, eq=False)
class ReferenceWindows:
    """Noisy windows, and the dense model's predictions at their masked positions.

    Of several processes each has every so-many-th window, so that each has its part of the first ones too.
    """

    input_ids: torch.Tensor  # (N, T) int64
    noisy_ids: torch.Tensor  # (N, S, T) int64
    mask_probability: torch.Tensor  # (N, S) fp32
    reference: ReferencePredictions
    limits: Limits
    workers: Workers = ALONE

    def first_rows(self, share: float) -> tuple[int, int]:
        """How many of this process's noisy copies are in a share of all, the first ones; and of how many in all."""
        own, copies = self.noisy_ids.shape[:2]
        total = sum(self.workers.gather(own * copies))
        rows = max(1, round(share * total))
        whole, rest = divmod(rows, copies)  # windows, and copies of the next one
        mine = len(range(self.workers.rank, whole, self.workers.count)) * copies
        return mine + (rest if self.workers.mine(whole) else 0), rows


class StitchedModel:
    """How far plans are from the dense model: the divergence of their denoising processes, in nats per token.

    As NELBO weighs cross-entropies: the sum over masked positions of KL(dense || plan) / p, p the probability of being
    masked, over the number of tokens. Unweighted KL favoured plans that lose where nearly everything is masked.

    Args:
        model: what `build_library` left: uncut, with the levels of `counts`. It is changed during a measurement only.
        biases: (block, kind) -> bias of the dense consumer, where it has one.
        constant: whether levels have a bias as last column.
    """

    def __init__(
        self,
        model: DiffusionLM,
        library: Library,
        counts: Counts,
        biases: dict[UnitKey, torch.Tensor],
        windows: ReferenceWindows,
        constant: bool = False,
    ):
        self.counts = dict(counts)
        self._model, self._adapter, self._library = model, Adapter(model), library
        self._biases, self._windows, self._constant = biases, windows, constant
        length = windows.noisy_ids.shape[2]
        rows = self._adapter.model.layout.rows(windows.noisy_ids, windows.input_ids[:, None])  # (N, S, .)
        self._rows, self._length = rows.flatten(0, 1), length  # (N * S, .)
        masked = masked_positions(windows.input_ids, windows.noisy_ids, self._adapter.mask_id)  # (N, S, T)
        self._masked = masked.reshape(-1, length)  # (N * S, T)
        self._row_weights = 1 / windows.mask_probability.flatten()  # (N * S,)
        self._firsts = [0, *self._masked.sum(1).cumsum(0).tolist()]  # masked positions before each row
        self._batch = windows.limits.sequences(*rows.shape[1:])
        self._keep_states()

    @torch.inference_mode()
    def _keep_states(self) -> None:
        """The residual stream of the current plan before every `stride`-th block, within the memory budget."""
        blocks, rows = len(self._adapter.blocks), len(self._rows)
        dtype = self._model.embedding.weight.dtype
        shape = (*self._rows.shape, self._adapter.hidden_size)
        room = max(1, self._windows.limits.budget // (dtype.itemsize * math.prod(shape)))
        self._stride = -(-blocks // room)
        self._states = empty_on_host((-(-blocks // self._stride), *shape), dtype, self._windows.limits.budget)
        context = self._adapter.context(self._rows.shape)
        for start in range(0, rows, self._batch):
            part = slice(start, start + self._batch)
            x = self._model.embedding(self._rows[part].to(compute_device(self._model)))  # (b, T, C)
            for block in self._adapter.blocks:
                if block.index % self._stride == 0:
                    self._states[block.index // self._stride, part] = x.to(self._states.device)
                x = block.module(x, *context)  # (b, T, C)

    def loss(self, counts: Counts, share: float = 1.0) -> float:
        """Divergence from the dense model, in nats per token.

        Args:
            share: of the noisy windows, the first of them.
        """
        changed = [key for key in counts if counts[key] != self.counts[key]]
        place = min((index for index, _ in changed), default=len(self._adapter.blocks) - 1) // self._stride
        try:
            for key in changed:
                self._set(key, counts[key])
            return self._measure(place, share)
        finally:
            for key in changed:
                self._set(key, self.counts[key])

    def _set(self, key: UnitKey, steps: int) -> None:
        linear = self._adapter.blocks[key[0]][CONSUMER[key[1]]]
        weight = self._library.weight(key, steps)  # (O, C [+ 1])
        set_level(linear, weight, self._biases.get(key), self._constant)

    @torch.inference_mode()
    def _measure(self, place: int, share: float) -> float:
        """The divergence with the weights that the model has now, from kept states `place` on."""
        rows, of_all = self._windows.first_rows(share)
        total, device = 0.0, compute_device(self._model)
        for start in range(0, rows, self._batch):
            part = slice(start, min(start + self._batch, rows))
            states, masked = (each.to(device) for each in (self._states[place, part], self._masked[part]))
            hidden = encode_from(self._model, states, place * self._stride, masked)  # (M, C)
            weights = self._row_weights[part, None].expand(masked.shape).to(device)[masked]  # (M,)
            for piece in logit_slices(len(hidden), self._model.output_head.weight.shape[0], KINDS):
                logits = self._model.output_head(hidden[piece]).float()  # (m, V)
                first = self._firsts[start]
                theirs = self._windows.reference.at(slice(first + piece.start, first + piece.stop), device)
                total += float((kl_divergence(theirs, logits) * weights[piece]).double().sum())
        return sum(self._windows.workers.gather(total)) / (of_all * self._length)


def consumer_biases(adapter: Adapter) -> dict[UnitKey, torch.Tensor]:
    """(block, kind) -> bias (O,) of the dense consumer, where it has one."""
    biases = {(block.index, kind): block[CONSUMER[kind]].bias for block in adapter.blocks for kind in block.kinds}
    return {key: bias for key, bias in biases.items() if bias is not None}
