"""What a checkpoint keeps of a reference's predictions, as units of a run (docs/methods.md section 6).

The reference comes first: its predictions lie in files, and no two models are in memory at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from structprune.evaluation import results
from structprune.evaluation.fidelity import masked_kl, reference_predictions
from structprune.evaluation.nelbo import maskable_tokens, nelbo_of, with_next_tokens
from structprune.evaluation.prediction_files import PredictionFiles
from structprune.evaluation.units import TextUnit
from structprune.models.encode import Batches
from structprune.models.modeling_structprune import DiffusionLM


@dataclass(frozen=True)
class Run:
    """What a run's earlier units have left, as a checkpoint's units see it."""

    files: PredictionFiles
    is_reference: bool  # whether the checkpoint is the one that the others are compared with
    reference_rows: Callable[[str], Mapping[str, results.Row]]  # task -> the reference's rows so far, by key
    own_rows: Callable[[str], Mapping[str, results.Row]]  # likewise the checkpoint's


@dataclass(frozen=True)
class FidelityUnit(TextUnit):
    """Windows of text under noise, where predictions are also compared with the reference's."""

    top: int  # likeliest tokens kept of a reference's prediction
    of: Run | None = field(default=None, repr=False)

    @property
    def settings(self) -> dict:
        return super().settings | {"fidelity_top": self.top}

    def bound(self, run: Run) -> "FidelityUnit":
        return replace(self, of=run)

    def is_kept(self, indices: Sequence[int]) -> bool:
        assert self.of is not None
        return not self.of.is_reference or all(self.of.files.has(self.keys[index]) for index in indices)

    def run(self, model: DiffusionLM, indices: Sequence[int], batch: Batches) -> list[results.Row]:
        return [self._window(model, index, batch) for index in indices]

    def _window(self, model: DiffusionLM, index: int, batch: Batches) -> results.Window:
        """One window at a time, which bounds the predictions in memory."""
        assert self.of is not None
        ids, key, (noisy, probability) = self.windows[index : index + 1], self.keys[index], self.noised(index)
        if self.of.is_reference:
            kept, result = reference_predictions(model, ids, noisy, self.top, batch)
            self.of.files.save(key, kept, noisy[0])
        else:
            result = masked_kl(model, ids, noisy, self.of.files.load(key, noisy[0]), batch)
        estimate = nelbo_of(result.nats, result.masked_tokens, probability, maskable_tokens(model, ids.shape[1]))
        estimate = with_next_tokens(estimate, model, ids, batch)
        causal = None if estimate.causal is None else estimate.causal.item()
        tokens, correct, agreed = (int(each.sum()) for each in (result.masked_tokens, result.correct, result.agreed))
        numbers = (estimate.nelbo.item(), estimate.masked_nats.item(), tokens, self.copies, self.copies, correct)
        apart = (None, None) if self.of.is_reference else (result.kl.double().sum().item(), agreed)
        return replace(results.Window(self.task, key, *numbers, *apart), causal_nats=causal)
