"""How far a student is from its teacher on text that is not learnt, under one noise for all measurements.

Shapes: n windows, S noisy copies, T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

from structprune.calibration.noise import stratified_noise
from structprune.evaluation.causal import NextTokens, causal_kl, causal_reference
from structprune.evaluation.fidelity import Fidelity, ReferencePredictions, masked_kl, reference_predictions
from structprune.models.encode import Batches
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device
from structprune.recovery.sharded import whole_weights
from structprune.recovery.text import RecoveryText
from structprune.workers import Workers

Part = tuple[Fidelity, NextTokens | None]  # of some windows
T = TypeVar("T")
HELD_OUT_SEED = 4000  # plus the run's: noise that training does not draw
GROUP = 8  # windows that one process measures at a time, at most


@dataclass(frozen=True, eq=False)
class Figures:
    """Means over noisy copies for every window, and over all masked tokens.

    Attributes:
        kl: (n,) fp64 divergence from the teacher. nelbo: (n,) fp64. Both in nats per token that may be masked, with
            masked tokens weighted by 1 / p.
        agreement: share of masked tokens whose likeliest prediction is the teacher's. accuracy: of clean tokens.
        causal_kl, causal_ce: (n,) fp64 divergence and nats of the next token of the text without noise; None of a model
            that is not causal too.
    """

    kl: torch.Tensor
    nelbo: torch.Tensor
    agreement: float
    accuracy: float
    causal_kl: torch.Tensor | None = None
    causal_ce: torch.Tensor | None = None

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """What every window has of its own, by name, (n,) each."""
        values = {name: getattr(self, name) for name in ("kl", "nelbo", "causal_kl", "causal_ce")}
        return {name: value for name, value in values.items() if value is not None}

    def means(self) -> dict[str, float]:
        """The means over windows, as plain data."""
        own = {name: value.mean().item() for name, value in self.losses.items()}
        return own | {"agreement": self.agreement, "accuracy": self.accuracy}


def per_token(sums: torch.Tensor, rate: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean over copies of Σ / p, per token that may be masked: (n, S), (n, S), (n,) -> (n,) fp64."""
    return (sums.double() / rate.double()).mean(1) / counts.clamp(min=1)


class HeldOutStudy:
    """The held-out windows of a recovery, and what the teacher predicts there, shared among processes.

    Args:
        teacher: measured once; it may be freed afterwards.
        samples: S.
        place: the processes of the run; each measures every `count`-th group of windows.
    """

    def __init__(self, teacher: DiffusionLM, text: RecoveryText, samples: int, seed: int, place: Workers):
        self._ids, self._place = text.held_out, place  # (n, T)
        mask_id, edges = teacher.config.mask_token_id, teacher.edges_visible
        generator = torch.Generator().manual_seed(HELD_OUT_SEED + seed)
        noisy, self._rate = stratified_noise(self._ids, mask_id, generator, samples, edges)  # (n, S, T), (n, S)
        learnt = torch.ones_like(self._ids, dtype=torch.bool) if text.held_out_learnt is None else text.held_out_learnt
        if edges:
            learnt = learnt.clone()
            learnt[:, 0] = learnt[:, -1] = False
        self._noisy = torch.where(learnt[:, None], noisy, self._ids[:, None])  # (n, S, T)
        self._counts, self._learnt = learnt.sum(1), learnt[:, 1:]  # (n,), (n, T - 1)
        count = len(self._ids)
        size = max(1, min(GROUP, count // place.count))  # every process has a group where there are enough windows
        self._groups = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        # by the first window of this process's groups, of masked and of next tokens
        self._references: dict[int, tuple[ReferencePredictions, ReferencePredictions | None]] = {}
        self.teacher = self._measured(lambda group: self._refer(teacher, group))

    def _refer(self, teacher: DiffusionLM, group: slice) -> Part:
        batches, ids = Batches.automatic(compute_device(teacher)), self._ids[group]
        reference, own = reference_predictions(teacher, ids, self._noisy[group], batch=batches)
        following, figures = causal_reference(teacher, ids, batches) if teacher.layout.causal else (None, None)
        self._references[group.start] = reference, following
        return own, figures

    def measure(self, model: DiffusionLM) -> Figures:
        """The figures of a student, the same in every process; its training mode is left as it is."""
        training = model.training
        model.eval()
        batches = Batches.automatic(compute_device(model))

        def work(group: slice) -> Part:
            reference, following = self._references[group.start]
            own = masked_kl(model, self._ids[group], self._noisy[group], reference, batch=batches)
            return own, None if following is None else causal_kl(model, self._ids[group], following, batches)

        with whole_weights(model):
            figures = self._measured(work)
        model.train(training)
        return figures

    def _measured(self, work: Callable[[slice], Part]) -> Figures:
        """Figures of all windows, from those of every group."""
        parts = self._place.share(lambda groups: [work(group) for group in groups], self._groups)
        own = _joined(Fidelity, [part for part, _ in parts])  # (n, S) each
        kl, nelbo = (per_token(each, self._rate, self._counts) for each in (own.kl, own.nats))  # (n,) each
        figures = Figures(kl, nelbo, own.agreement, own.accuracy)
        causal = [following for _, following in parts if following is not None]
        if not causal:
            return figures
        following = _joined(NextTokens, causal)  # (n, T - 1) each
        counts = self._learnt.sum(1).clamp(min=1)  # (n,)
        means = [(each.double() * self._learnt).sum(1) / counts for each in (following.kl, following.nats)]  # (n,) each
        return replace(figures, causal_kl=means[0], causal_ce=means[1])


def _joined(kind: type[T], parts: list[T]) -> T:
    """The tensors of several groups, one behind the other."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def paired(before: Figures, after: Figures) -> dict[str, dict[str, float]]:
    """Mean and standard error over windows of what changed, negative where it got better."""
    result = {}
    for name, value in after.losses.items():
        change = value - before.losses[name]  # (n,)
        result[name] = {
            "mean": change.mean().item(),
            "standard_error": (change.std() / math.sqrt(len(change))).item(),
        }
    return result
