"""Forecasts of Monte Carlo samples that were not run, from those that were: control variates without a forward pass.

The masks of all samples are known before any of them is run. A token's nats depend mostly on the token itself, on the
share of masks around it, and on whether its neighbours are masked. So a linear model of these features is fitted to the
samples that were run. A forecast is the sum of its predictions over the masked tokens, corrected by the model's mean
leave-one-out error (the difference estimator of survey sampling; its standard error by the jackknife). Shapes: N
samples of which S were run, L target tokens, F features.
"""

import math
from dataclasses import dataclass

import torch

RIDGE = 0.2  # strength of both priors in observations: a token is like all tokens, and all tokens cost 0 nats


@dataclass(frozen=True)
class Completed:
    """All samples of one answer, run or forecast.

    Only residuals and influences of `fresh` samples count: their mask was not run before, and is not empty.
    """

    values: torch.Tensor  # (N,) float64 weighted nats of every sample
    repeats: torch.Tensor  # (N,) int64, for a forecast the number of forecasts with its mask; 0 where known
    residuals: torch.Tensor  # (S,) float64, the value of every run sample minus its leave-one-out prediction
    influence: torch.Tensor  # (S,) float64, how much every run sample adds to the sum of all forecasts
    fresh: torch.Tensor  # (S,) bool; all false without forecasts

    def error(self) -> float:
        """Standard error of the mean of `values` as an estimate of the mean over all samples, had they been run.

        It adds the residual variance of every forecast (forecasts of one mask share theirs) and the variance of the
        model and its correction. Infinite where only one mask was run, however often.
        """
        count = int(self.fresh.sum())
        if not self.repeats.any():
            return 0.0
        if count < 2:
            return math.inf
        residual = self.residuals[self.fresh].var().item() * self.repeats.sum().item()
        model = (count - 1) / count * self.influence[self.fresh].square().sum().item()
        return (residual + model) ** 0.5 / len(self.values)


def surroundings(masked: torch.Tensor) -> torch.Tensor:
    """Features of every token in every sample: (N, L) bool -> (N, L, 4) float64.

    1, the masked share minus a half, and for the left and the right neighbour whether it is revealed minus the revealed
    share (0 without a neighbour).
    """
    share = masked.double().mean(1, keepdim=True)  # (N, 1)
    revealed = (~masked).double() - (1 - share)  # (N, L)
    none = torch.zeros_like(share)  # (N, 1)
    left = torch.cat((none, revealed[:, :-1]), dim=1)  # (N, L)
    right = torch.cat((revealed[:, 1:], none), dim=1)  # (N, L)
    return torch.stack((torch.ones_like(left), (share - 0.5).expand_as(left), left, right), dim=-1)


class TokenModel:
    """Ridge regression of tokens' nats: one linear function for all tokens, plus one of each token's own.

    Args:
        masked: (N, L) bool. fitted: (N,) bool, the samples to fit to.
        nats: (N, L) float64; read only at masked tokens of `fitted` samples.
    Attributes:
        left_out: (N, L) leave-one-out predictions: without the sample itself where it was fitted to.
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
        self.lines = line + torch.einsum("lfg,lg->lf", self.inverse, reply - product @ line)  # (L, F) sum of both
        self.predicted = torch.einsum("nlf,lf->nl", x, self.lines)  # (N, L)

        # leave-one-out: the common function is solved again, a token's own follows by Sherman-Morrison
        product_left = product.sum(0) - torch.einsum("nlf,nl,nlg->nfg", x, used, x)  # (N, F, F)
        self.line_left = torch.linalg.solve(
            product_left + prior, reply.sum(0) - torch.einsum("nlf,nl->nf", x, y)
        )  # (N, F)
        self.rest = reply - torch.einsum("lfg,ng->nlf", product, self.line_left)  # (N, L, F) over all samples
        base = torch.einsum("nlf,nf->nl", x, self.line_left)  # (N, L)
        self.missed = (y - base) * used  # (N, L) errors of the common function
        pull = torch.einsum("nlf,lfg->nlg", x, self.inverse)  # (N, L, F)
        leverage = torch.einsum("nlf,nlf->nl", pull, x) * used  # (N, L) below 1 because of the prior
        own = torch.einsum("nlf,nlf->nl", pull, self.rest) - leverage * self.missed  # (N, L)
        self.own_left = own / (1 - leverage)  # (N, L)
        self.left_out = base + self.own_left  # (N, L)

    def gained(self, direction: torch.Tensor) -> torch.Tensor:
        """Σ_l direction_l · line_l minus its value without each sample: (L, F) -> (N,)."""
        along = torch.einsum("lf,lfg->lg", direction, self.inverse)  # (L, F)
        across = torch.einsum("lf,nlf->nl", along, self.x) * self.used  # (N, L)
        own = torch.einsum("lf,nlf->nl", along, self.rest) + across * (self.own_left - self.missed)  # (N, L)
        without = self.line_left @ direction.sum(0) + own.sum(1)  # (N,)
        return (direction * self.lines).sum() - without


def complete(masked: torch.Tensor, weight: torch.Tensor, nats: torch.Tensor, run: int) -> Completed:
    """All samples of an answer of which the first `run` were run.

    A later sample is known, and not forecast, where its mask was run, or where it masks nothing (Dream). The latter
    is not fitted to either.

    Args:
        masked: (N, L) bool. weight: (N,) float64.
        nats: (S, L) float64 of the masked tokens, 0 elsewhere.
    """
    count = len(masked)
    _, pattern, times = masked.unique(dim=0, return_inverse=True, return_counts=True)  # (N,), (n,)
    first = torch.full_like(times, count).scatter_reduce(0, pattern, torch.arange(count), "amin")  # (n,)
    first = first[pattern]  # (N,) index of the first sample with the same mask
    some = masked.any(1)  # (N,)
    known = (first < run) | ~some  # (N,)
    if known.all():
        values = nats.sum(1)[first.clamp(max=run - 1)] * weight * some  # (N,)
        none = torch.zeros(run, dtype=torch.float64)  # (S,)
        return Completed(values, torch.zeros_like(times[pattern]), none, none, none.bool())
    fitted = known & some & (first == torch.arange(count))  # (N,) each mask once
    padded = torch.cat((nats, nats.new_zeros(count - run, nats.shape[1])))  # (N, L)
    model, fresh = TokenModel(masked, padded, fitted), fitted[:run]  # (S,)
    predicted = (model.left_out[first[:run]] * masked[:run]).sum(1)  # (S,)
    residuals = (nats.sum(1) - predicted) * weight[:run]  # (S,)
    mean = residuals[fresh].sum() / fresh.sum().clamp(min=1)  # ()
    measured = padded[first.clamp(max=run - 1)].sum(1) * some  # (N,)
    totals = torch.where(known, measured, (model.predicted * masked).sum(1))  # (N,)
    values = totals * weight + torch.where(known, 0.0, mean)  # (N,)
    repeats = torch.where(known, 0, times[pattern])  # (N,)
    forecasts, runs = int((~known).sum()), int(fresh.sum())
    correction = (residuals - mean) * forecasts / max(runs - 1, 1)  # (S,) what each adds through the mean
    influence = _influence(model, masked, weight, known, fresh) + correction  # (S,)
    return Completed(values, repeats, residuals, influence, fresh)


def _influence(
    model: TokenModel, masked: torch.Tensor, weight: torch.Tensor, known: torch.Tensor, fresh: torch.Tensor
) -> torch.Tensor:
    """How much every run sample adds to the sum of all forecasts through the model, (S,).

    The correction cancels what the model predicts for samples like those that were run; what remains is where the
    forecasts differ from them.
    """
    missing, count = (~known).sum().item(), max(fresh.sum().item(), 1)
    far = torch.einsum("nlf,nl->lf", model.x, masked * (weight * ~known)[:, None])  # (L, F)
    near = torch.einsum("nlf,nl->lf", model.x, model.used * weight[:, None])  # (L, F)
    return model.gained(far - missing / count * near)[: len(fresh)]
