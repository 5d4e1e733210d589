"""What Monte Carlo samples that were not run would say, from those that were: control variates that cost no forward.

The masks of all samples are known before a single one is run. What is not known, a token's nats, depends most on the
token itself, on how much around it is masked, and on whether its neighbours are. So a linear model of these is fitted
to the samples run, sums its predictions over the masked tokens of the others, and is corrected by its mean error in
samples left out of the fit (the difference estimator of survey sampling; its error by the jackknife). Shapes: N samples
of which S were run, L target tokens, F features.
"""

import math
from dataclasses import dataclass

import torch

RIDGE = 0.2  # of the prior, in observations: that a token is like all others, and all like none


@dataclass(frozen=True)
class Completed:
    """All samples of one answer, run or forecast.

    Attributes:
        values: (N,) float64 weighted nats of every sample.
        repeats: (N,) int64, of a forecast how many forecasts have its mask, itself among them; 0 where known.
        residuals: (S,) float64, of every sample run, its value minus what the others say of it.
        influence: (S,) float64, what all forecasts together gained by it.
        fresh: (S,) bool, the samples run whose mask was not run before and is not empty; only their residuals and
            influences count; all false where nothing is forecast.
    """

    values: torch.Tensor
    repeats: torch.Tensor
    residuals: torch.Tensor
    influence: torch.Tensor
    fresh: torch.Tensor

    def error(self) -> float:
        """Standard error of the mean of `values` as an estimate of the full count's.

        It is of what is new in every forecast, those of one mask together, and of the model and its correction.
        Infinite where one mask, however often, is all that was run.
        """
        count = int(self.fresh.sum())
        if not self.repeats.any():
            return 0.0
        if count < 2:
            return math.inf
        new = self.residuals[self.fresh].var().item() * self.repeats.sum().item()
        model = (count - 1) / count * self.influence[self.fresh].square().sum().item()
        return (new + model) ** 0.5 / len(self.values)


def surroundings(masked: torch.Tensor) -> torch.Tensor:
    """Features of every token in every sample: (N, L) bool -> (N, L, 4) float64.

    One, the share masked less a half, and for the left and the right neighbour whether it is revealed less the share
    revealed (0 where there is none).
    """
    share = masked.double().mean(1, keepdim=True)  # (N, 1)
    revealed = (~masked).double() - (1 - share)  # (N, L)
    none = torch.zeros_like(share)  # (N, 1)
    left = torch.cat((none, revealed[:, :-1]), dim=1)  # (N, L)
    right = torch.cat((revealed[:, 1:], none), dim=1)  # (N, L)
    return torch.stack((torch.ones_like(left), (share - 0.5).expand_as(left), left, right), dim=-1)


class TokenModel:
    """Ridge regression of tokens' nats: one line for all tokens, and each token's own beside it.

    Args:
        masked: (N, L) bool.
        nats: (N, L) float64; read only at masked tokens of `fitted` samples.
        fitted: (N,) bool, the samples to learn from.
    Attributes:
        predicted: (N, L).
        left_out: (N, L) predicted by both lines without the sample, where it was learned from.
    """

    def __init__(self, masked: torch.Tensor, nats: torch.Tensor, fitted: torch.Tensor):
        self.x = x = surroundings(masked)  # (N, L, F)
        self.used = used = (masked & fitted[:, None]).double()  # (N, L)
        y = torch.where(used > 0, nats, 0.0)  # (N, L)
        prior = RIDGE * torch.eye(x.shape[-1], dtype=torch.float64)  # (F, F)
        product = torch.einsum("nlf,nl,nlg->lfg", x, used, x)  # (L, F, F)
        reply = torch.einsum("nlf,nl->lf", x, y)  # (L, F)
        self.inverse = torch.linalg.inv(product + prior)  # (L, F, F)
        line = torch.linalg.solve(product.sum(0) + prior, reply.sum(0))  # (F,)
        self.lines = line + torch.einsum("lfg,lg->lf", self.inverse, reply - product @ line)  # (L, F) both together
        self.predicted = torch.einsum("nlf,lf->nl", x, self.lines)  # (N, L)

        # without one sample: the line of all is solved anew, a token's own follows by Sherman-Morrison
        product_left = product.sum(0) - torch.einsum("nlf,nl,nlg->nfg", x, used, x)  # (N, F, F)
        self.line_left = torch.linalg.solve(
            product_left + prior, reply.sum(0) - torch.einsum("nlf,nl->nf", x, y)
        )  # (N, F)
        self.rest = reply - torch.einsum("lfg,ng->nlf", product, self.line_left)  # (N, L, F), of all samples
        base = torch.einsum("nlf,nf->nl", x, self.line_left)  # (N, L)
        self.missed = (y - base) * used  # (N, L) by the line of all
        pull = torch.einsum("nlf,lfg->nlg", x, self.inverse)  # (N, L, F)
        leverage = torch.einsum("nlf,nlf->nl", pull, x) * used  # (N, L), below 1 by the prior
        own = torch.einsum("nlf,nlf->nl", pull, self.rest) - leverage * self.missed  # (N, L)
        self.own_left = own / (1 - leverage)  # (N, L)
        self.left_out = base + self.own_left  # (N, L)

    def gained(self, direction: torch.Tensor) -> torch.Tensor:
        """By how much Σ_l direction_l · line_l is larger with each sample than without it: (L, F) -> (N,)."""
        along = torch.einsum("lf,lfg->lg", direction, self.inverse)  # (L, F)
        across = torch.einsum("lf,nlf->nl", along, self.x) * self.used  # (N, L)
        own = torch.einsum("lf,nlf->nl", along, self.rest) + across * (self.own_left - self.missed)  # (N, L)
        without = self.line_left @ direction.sum(0) + own.sum(1)  # (N,)
        return (direction * self.lines).sum() - without


def complete(masked: torch.Tensor, weight: torch.Tensor, nats: torch.Tensor, seen: int) -> Completed:
    """All samples of an answer whose first `seen` were run.

    A later sample with a mask that was run is known as well, not forecast, and so is one without a mask (Dream), which
    says nothing of the others either.

    Args:
        masked: (N, L) bool. weight: (N,) float64.
        nats: (seen, L) float64 of the tokens masked, 0 elsewhere.
    """
    count = len(masked)
    _, pattern, times = masked.unique(dim=0, return_inverse=True, return_counts=True)  # (N,), (n,)
    first = torch.full_like(times, count).scatter_reduce(0, pattern, torch.arange(count), "amin")  # (n,) sample
    first = first[pattern]  # (N,) sample in which its mask comes first
    some = masked.any(1)  # (N,)
    known = (first < seen) | ~some  # (N,)
    if known.all():
        values = nats.sum(1)[first.clamp(max=seen - 1)] * weight * some  # (N,)
        nothing = torch.zeros(seen, dtype=torch.float64)  # (S,)
        return Completed(values, torch.zeros_like(times[pattern]), nothing, nothing, nothing.bool())
    fitted = known & some & (first == torch.arange(count))  # (N,) each mask once
    padded = torch.cat((nats, nats.new_zeros(count - seen, nats.shape[1])))  # (N, L)
    model, fresh = TokenModel(masked, padded, fitted), fitted[:seen]  # (S,)
    said = (model.left_out[first[:seen]] * masked[:seen]).sum(1)  # (S,)
    residuals = (nats.sum(1) - said) * weight[:seen]  # (S,)
    mean = residuals[fresh].sum() / fresh.sum().clamp(min=1)  # ()
    run = padded[first.clamp(max=seen - 1)].sum(1) * some  # (N,)
    totals = torch.where(known, run, (model.predicted * masked).sum(1))  # (N,)
    values = totals * weight + torch.where(known, 0.0, mean)  # (N,)
    repeats = torch.where(known, 0, times[pattern])  # (N,)
    return Completed(
        values, repeats, residuals, _influence(model, masked, weight, known, residuals - mean, fresh), fresh
    )


def _influence(
    model: TokenModel,
    masked: torch.Tensor,
    weight: torch.Tensor,
    known: torch.Tensor,
    residuals: torch.Tensor,
    fresh: torch.Tensor,
) -> torch.Tensor:
    """Of every sample run, on the sum of all forecasts with their correction (S,).

    The correction takes back what the model makes of samples like those run; what is left is where the others differ
    from them.
    """
    missing, count = (~known).sum().item(), max(fresh.sum().item(), 1)
    far = torch.einsum("nlf,nl->lf", model.x, masked * (weight * ~known)[:, None])  # (L, F)
    near = torch.einsum("nlf,nl->lf", model.x, model.used * weight[:, None])  # (L, F)
    gained = model.gained(far - missing / count * near)[: len(fresh)]  # (S,)
    return gained + residuals * missing / max(count - 1, 1)
