"""What the dense model predicts for a batch: computed on the way, or read from what was written once.

Shapes: B rows of a batch, T tokens, M masked positions of it, k tokens that are kept of a prediction, C features,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from structprune.evaluation.fidelity import likeliest_and_rest
from structprune.models.encode import encode_noisy, encode_rows, next_tokens, predicting
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device


@dataclass(frozen=True, eq=False)
class Predictions:
    """A teacher's predictions at the M masked positions of a batch, row by row from left to right.

    Either `states`, from which `head` makes logits, or `tokens` and `log_p`.

    Attributes:
        states: (M, C) hidden states after the final norm. head: (m, C) -> (m, V) logits.
        streams: (B, S, C) each, residual streams behind dense blocks of rows as the layout has them, where they are
            learnt.
        tokens: (M, k) int64, the likeliest. log_p: (M, k + 1) fp32, theirs and that of all others together.
        causal: those of next tokens of the text without noise, where they are learnt.
    """

    states: torch.Tensor | None = None
    head: Callable[[torch.Tensor], torch.Tensor] | None = None
    streams: tuple[torch.Tensor, ...] = ()
    tokens: torch.Tensor | None = None
    log_p: torch.Tensor | None = None
    causal: "Predictions | None" = None

    def outcomes(self, part: slice, logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the teacher and of a student over the same outcomes.

        Args:
            part: of the M positions. logits: (m, V) the student's there.
        Returns:
            (m, K) fp32 each, K = V, or k + 1 where only the likeliest are known; the first without a gradient.
        """
        logits = logits.float() / temperature
        if self.tokens is None:
            assert self.states is not None and self.head is not None
            with torch.no_grad():
                own = self.head(self.states[part]).float().to(logits.device)  # (m, V)
            return F.log_softmax(own / temperature, -1), logits.log_softmax(-1)
        assert self.log_p is not None
        return self.log_p[part], likeliest_and_rest(logits, self.tokens[part])


class LiveTeacher:
    """A dense model that predicts every batch anew.

    Args:
        model: the dense one; it may compute on another device than the student.
        ends: blocks behind which the student learns from the residual stream too, but for the last.
        causal: whether next tokens of the text without noise are learnt too.
    """

    def __init__(self, model: DiffusionLM, ends: Sequence[int] = (), causal: bool = False):
        self._model, self._ends, self._causal = model.eval().requires_grad_(False), ends, causal

    @torch.no_grad()
    def predict(
        self,
        windows: tuple[torch.Tensor, torch.Tensor],
        masked: torch.Tensor,
        _items: torch.Tensor,
        learnt: torch.Tensor | None = None,
    ) -> Predictions:
        """Predictions at the masked positions (B, T) of windows: clean and noisy ids, (B, T) each.

        Args:
            learnt: (B, T) bool, tokens of the text that are learnt; None: all.
        """
        model, device = self._model, compute_device(self._model)
        clean, noisy, targets = (each.to(device) for each in (*windows, masked))  # (B, T) each
        if not (self._ends or self._causal):
            return Predictions(encode_noisy(model, noisy, clean, targets), model.output_head)  # (M, C)
        inputs: list[torch.Tensor] | None = [] if self._ends else None  # (B, S, C) of every block
        hidden = encode_rows(model, model.layout.rows(noisy, clean), inputs)  # (B, S, C)
        streams, causal = tuple(inputs[end + 1] for end in self._ends) if inputs else (), None
        if self._causal:
            texts = torch.ones_like(targets) if learnt is None else learnt.to(device)  # (B, T)
            causal = Predictions(hidden[next_tokens(model, texts)], model.output_head)  # (M, C)
        return Predictions(hidden[predicting(model, targets)], model.output_head, streams, causal=causal)
