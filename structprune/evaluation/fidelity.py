"""How near a model's predictions at masked positions are to a reference model's (docs/methods.md section 6).

Shapes: N windows, S noisy copies, T tokens, M masked positions (window by window, copy by copy, from left to right),
m of a slice, V vocabulary, k tokens that are kept of each distribution.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from structprune.errors import UserError
from structprune.evaluation.masked import masked_positions, masked_sums
from structprune.models.encode import Batches
from structprune.models.modeling_structprune import DiffusionLM

TOP = 256  # tokens kept of a distribution: 2 kB a position
KINDS = 3  # logits, a copy without the kept tokens, and its exponentials


@dataclass(frozen=True)
class ReferencePredictions:
    """A model's distributions at M positions: its k likeliest tokens, and all others as one.

    With k = V nothing is left out, and divergences are exact.
    """

    tokens: torch.Tensor  # (M, k) int32, the likeliest first
    log_p: torch.Tensor  # (M, k) fp32 nats
    rest: torch.Tensor  # (M,) fp32, log of the other tokens' probability; -inf with k = V
    vocabulary: int  # V

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def outcomes(self) -> torch.Tensor:
        """Log-probabilities of the kept tokens and of all others together, (M, k + 1)."""
        return torch.cat((self.log_p, self.rest[:, None]), dim=-1)

    def at(self, places: slice, device: torch.device) -> "ReferencePredictions":
        """Those of some positions, on a device."""
        tokens, log_p, rest = (each[places].to(device) for each in (self.tokens, self.log_p, self.rest))
        return ReferencePredictions(tokens, log_p, rest, self.vocabulary)

    def write(self, places: slice, own: "ReferencePredictions") -> None:
        """Put predictions of some positions in their places."""
        self.tokens[places], self.log_p[places], self.rest[places] = own.tokens.cpu(), own.log_p.cpu(), own.rest.cpu()

    @classmethod
    def empty(cls, count: int, top: int, vocabulary: int) -> "ReferencePredictions":
        """Room for `count` positions, on CPU."""
        size = (count, min(top, vocabulary))
        tokens = torch.zeros(size, dtype=torch.int32)  # (M, k)
        return cls(tokens, torch.zeros(size), torch.zeros(count), vocabulary)


@dataclass(frozen=True)
class Fidelity:
    """Sums over the masked tokens of every noisy copy, (N, S) fp32 each."""

    masked_tokens: torch.Tensor
    nats: torch.Tensor  # cross-entropy of the clean tokens
    correct: torch.Tensor  # clean tokens that were the likeliest
    kl: torch.Tensor  # KL(reference || model) in nats; 0 for the reference itself
    agreed: torch.Tensor  # tokens whose likeliest prediction is the reference's

    @property
    def mean_kl(self) -> float:
        """Nats per masked token."""
        return self._mean(self.kl)

    @property
    def agreement(self) -> float:
        return self._mean(self.agreed)

    @property
    def accuracy(self) -> float:
        return self._mean(self.correct)

    def _mean(self, sums: torch.Tensor) -> float:
        return (sums.double().sum() / self.masked_tokens.double().sum().clamp(min=1)).item()


def likeliest(logits: torch.Tensor, top: int = TOP) -> ReferencePredictions:
    """The `top` likeliest tokens of each distribution and the mass of the rest: (m, V) fp32 logits."""
    total = logits.logsumexp(-1, keepdim=True)  # (m, 1)
    values, tokens = logits.topk(min(top, logits.shape[-1]), dim=-1)  # (m, k) each
    rest = _rest(logits, tokens) - total.squeeze(-1)  # (m,)
    return ReferencePredictions(tokens.int(), values - total, rest, logits.shape[-1])


def kl_divergence(reference: ReferencePredictions, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) in nats over k + 1 outcomes, the kept tokens and all others: (m, V) fp32 -> (m,).

    By the log-sum inequality it is at most the divergence over all V tokens, and equal to it with k = V.
    """
    log_p, log_q = reference.outcomes, likeliest_and_rest(logits, reference.tokens)  # (m, k + 1) each
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)  # (m, k + 1)
    return terms.sum(-1).clamp(min=0)  # rounding may go below


def likeliest_and_rest(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens, and of all others together: (m, V) fp32, (m, k) integers -> (m, k + 1).

    Where all tokens are named, the rest has the log-probability -inf, and no gradient.
    """
    total, tokens = logits.logsumexp(-1, keepdim=True), tokens.long()  # (m, 1), (m, k)
    named = logits.gather(-1, tokens) - total  # (m, k)
    if tokens.shape[-1] == logits.shape[-1]:
        return torch.cat((named, torch.full_like(total, -torch.inf)), dim=-1)
    return torch.cat((named, _rest(logits, tokens)[:, None] - total), dim=-1)


def process_divergence(fidelity: Fidelity, mask_probability: torch.Tensor, length: int) -> float:
    """The divergence of two denoising processes in nats per token: the mean over noisy copies of Σ KL / p / T.

    It weighs masked tokens as NELBO does, so that copies with few of them count as much as those with many. Where the
    text is the reference's own, it is the expected difference of the two NELBOs.

    Args:
        mask_probability: (N, S) p of every noisy copy. length: T.
    """
    return (fidelity.kl.double() / mask_probability.double()).mean().item() / length


def reference_predictions(
    model: DiffusionLM,
    input_ids: torch.Tensor,
    noisy_ids: torch.Tensor,
    top: int = TOP,
    batch: int | Batches = 16,
) -> tuple[ReferencePredictions, Fidelity]:
    """A model's predictions at the masked positions of noisy windows, to compare other models with.

    They take 8 k bytes a position, in memory and on disk.

    Args:
        input_ids: (N, T) int64 clean windows.
        noisy_ids: (N, S, T) int64 noisy copies.
        top: k. batch: as for `masked_sums`.
    Returns:
        M predictions on CPU, and the model's own figures.
    """
    count = int(masked_positions(input_ids, noisy_ids, model.config.mask_token_id).sum())
    kept = ReferencePredictions.empty(count, top, model.output_head.weight.shape[0])

    def measure(logits: torch.Tensor, labels: torch.Tensor, places: slice) -> torch.Tensor:
        kept.write(places, likeliest(logits, top))
        none = torch.zeros_like(labels)  # (m,)
        return _columns(logits, labels, none, none + 1)

    return kept, _fidelity(masked_sums(model, (input_ids, noisy_ids), measure, batch, kinds=KINDS))


def masked_kl(
    model: DiffusionLM,
    input_ids: torch.Tensor,
    noisy_ids: torch.Tensor,
    reference: ReferencePredictions,
    batch: int | Batches = 16,
) -> Fidelity:
    """A model's divergence from a reference, at the masked positions of the noisy windows the reference saw.

    Args:
        input_ids, noisy_ids, batch: as for `reference_predictions`, whose first result `reference` is.
    Raises:
        UserError: the model has another vocabulary.
        ValueError: the reference saw another number of masked positions.
    """
    count = int(masked_positions(input_ids, noisy_ids, model.config.mask_token_id).sum())
    if count != len(reference):
        raise ValueError(f"the reference has {len(reference)} positions, and {count} are masked: give its windows")
    check_one_vocabulary(reference.vocabulary, model.output_head.weight.shape[0])

    def measure(logits: torch.Tensor, labels: torch.Tensor, places: slice) -> torch.Tensor:
        theirs = reference.at(places, logits.device)
        # a tie counts as agreement, so that a model always agrees with itself
        likely = logits.gather(-1, theirs.tokens[:, :1].long()).squeeze(-1)  # (m,)
        return _columns(logits, labels, kl_divergence(theirs, logits), likely == logits.amax(-1))

    return _fidelity(masked_sums(model, (input_ids, noisy_ids), measure, batch, kinds=KINDS))


def check_one_vocabulary(reference: int, model: int) -> None:
    """Raise UserError for predictions over vocabularies of two sizes."""
    if reference != model:
        raise UserError(
            f"the reference predicts {reference} tokens and the model {model}: compare models of one vocabulary"
        )


def _rest(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over the other tokens: (m, V), (m, k) int64 -> (m,); not 1 minus the kept ones, which cancels."""
    return logits.scatter(-1, tokens, -torch.inf).logsumexp(-1)  # (m,)


def _columns(logits: torch.Tensor, labels: torch.Tensor, kl: torch.Tensor, agreed: torch.Tensor) -> torch.Tensor:
    """(m, V) and (m,) each -> (m, 4): cross-entropy, whether the likeliest token is right, and the two given."""
    nats = F.cross_entropy(logits, labels, reduction="none")  # (m,)
    correct = logits.argmax(-1) == labels  # (m,)
    return torch.stack((nats, correct.float(), kl.float(), agreed.float()), dim=-1)  # (m, 4)


def _fidelity(sums: torch.Tensor) -> Fidelity:
    """(N, S, 5), as `masked_sums` returns them."""
    return Fidelity(*sums.unbind(2))
