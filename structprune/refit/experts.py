"""Refit of the down projections of experts whose channels were cut, or that work beside fewer experts.

Every expert is fitted on the tokens that it sees in the pruned model: rows are weighted by the token's share of it, and
targets make up for what the stream lacks, a part for each expert of the token (docs/methods.md section 5). What all
tokens go through is fitted on all of them, and makes up for nothing else.
Shapes: k experts of a token, b sequences of T tokens, m of them that an expert sees, O outputs, K remaining channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from structprune.models.adapter import EXPERTS, BlockView, UnitKey
from structprune.models.experts_structprune import SHARED, ExpertBlock, role_of, tokens_by_expert
from structprune.refit.products import LayerFit, Products, set_weight
from structprune.refit.solve import choose
from structprune.statistics.activations import add_gram, add_products, empty_sum, relative_weight
from structprune.statistics.residual import ResidualRun

if TYPE_CHECKING:
    from structprune.refit.walk import Walk

Sums = list[torch.Tensor]  # fp64 Gram matrix (K, K), target (O, K), and the power of the target output (1, 1)


@dataclass(frozen=True, eq=False)
class MixturePlace:
    """The experts of a block of the dense model, and what is left of them.

    Attributes:
        run: of the small model, whose stream is before the MLP.
        experts: the dense numbers of the experts that are left.
        predicting: the output is read only at positions with a prediction.
        share: of the dense model's stream in the targets, as `dense_share`.
    """

    walk: "Walk"
    run: ResidualRun
    dense: BlockView
    small: BlockView
    experts: Sequence[int]
    predicting: bool
    share: float
    kind = EXPERTS

    @property
    def key(self) -> UnitKey:
        """Of the dense model's block."""
        return self.dense.index, self.kind

    def refit(self) -> list[LayerFit]:
        """Give every down projection new weights, where held-out rows gain by them."""
        fitted, checked = self._products()
        products = {part: (Products.of_sums(fitted[part]), Products.of_sums(checked[part])) for part in self.parts}
        fits = []
        for part, source in self.parts.items():
            linear = self.small[role_of("down", part)]
            weight = linear.weight.to(self.walk.dense.device).double()  # (O, K)
            fit, check = products[part]
            choice = choose(self.walk.settings, weight, fit, check, linear.in_features, self.walk.workers)
            set_weight(linear, choice[0], constant=False)
            fits.append(LayerFit.of(self.dense.index, role_of("down", source), weight, check, choice))
        return fits

    @property
    def parts(self) -> dict[str, str]:
        """A part of what is left of the mixture -> the part of the dense one that it was."""
        experts = {str(number): str(expert) for number, expert in enumerate(self.experts)}
        return experts | {part: part for part in (SHARED,) if part in self.small.module.parts}

    def _products(self) -> tuple[dict[str, Sums], dict[str, Sums]]:
        """Of every part, over the fitted rows and over the held-out ones."""
        sums = {fitted: {part: self._empty(part) for part in self.parts} for fitted in (True, False)}
        for rows in self.run.slices():
            for part, fitted in self.walk.parts(rows):
                self._add(sums[fitted], part)
        for each in (*sums[True].values(), *sums[False].values()):
            self.walk.workers.add_up(*each)
        return sums[True], sums[False]

    def _empty(self, part: str) -> Sums:
        outputs, inputs = self.small[role_of("down", part)].weight.shape
        device = self.walk.dense.device
        return [empty_sum(inputs, inputs, device), empty_sum(outputs, inputs, device), empty_sum(1, 1, device)]

    def _add(self, sums: dict[str, Sums], part: slice) -> None:
        """Add the rows of some sequences to the sums of all parts, in place."""
        settings, small, dense = self.walk.settings, *map(mixture_of, (self.small, self.dense))
        stream = self.run.states(part)  # (b, T, O)
        source = self.walk.targets.states(part) if settings.target != "layer" else stream  # (b, T, O)
        weight = self.walk.rows.weight(part, self.predicting, stream.device, self.key)  # (b, T)
        weight = (relative_weight(stream, weight) if settings.relative else weight).flatten()  # (b * T,)
        h = small.part("mlp_norm")(stream).flatten(0, 1)  # (b * T, O)
        shares, chosen = small.part("router")(h)  # (b * T, k) each
        sides = [(side, part) for side, part in ((source, self.share), (stream, 1 - self.share)) if part > 0]
        read = [(dense.part("mlp_norm")(side).flatten(0, 1), part) for side, part in sides]  # (b * T, O) each
        lacking = settings.stream * (source - stream).flatten(0, 1) / shares.sum(1, keepdim=True)  # (b * T, O)
        seen = tokens_by_expert(chosen, len(self.experts))
        for number, (expert, (tokens, place)) in enumerate(zip(self.experts, seen, strict=True)):  # (m,) each
            x = small.gated(str(number), h[tokens])  # (m, K)
            output = sum(part * dense.expert(str(expert), rows[tokens]) for rows, part in read)  # (m, O)
            target = output + lacking[tokens].to(x.dtype)  # (m, O)
            _count(sums[str(number)], x, target, weight[tokens] * shares[tokens, place])
        if SHARED in sums:
            target = sum(part * dense.expert(SHARED, rows) for rows, part in read)  # (b * T, O)
            _count(sums[SHARED], small.gated(SHARED, h), target, weight)


def _count(sums: Sums, x: torch.Tensor, target: torch.Tensor, omega: torch.Tensor) -> None:
    """Add rows (m, K), their targets (m, O) and weights (m,) to the sums of a part, in place."""
    gram, cross, power = sums
    add_gram(gram, x, omega)
    add_products(cross, target, x, omega)
    power += (target.float() * omega[:, None]).pow(2).sum()


def mixture_of(block: BlockView) -> ExpertBlock:
    return cast(ExpertBlock, block.mixture)
