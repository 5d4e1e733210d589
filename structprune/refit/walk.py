"""A dense model beside what is left of it, half block by half block, and the products that refits there need.

Attention first, then the MLP on the refitted attention's output, each on activations of the already pruned prefix.
Shapes: R sequences of T tokens, b of a batch, O outputs, C input channels, K remaining ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from structprune.config import ReconstructSettings
from structprune.models.adapter import CONSUMER, STREAM_READERS, Adapter, BlockView, UnitKey
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import give_back_memory
from structprune.refit.experts import MixturePlace
from structprune.refit.products import InputProducts, Products, RowSums
from structprune.refit.row_weights import WeightedRows
from structprune.statistics.activations import add_gram, add_products, add_rows, empty_sum, relative_weight
from structprune.statistics.residual import ResidualRun, TargetRun
from structprune.statistics.scan import Scan


class Walk:
    """The rows that refits of one dense model read; its side is measured once where that fits the budget.

    Args:
        scan: of the dense model; its calibration's held-out windows choose the dampings.
    """

    def __init__(self, scan: Scan, settings: ReconstructSettings):
        self.settings, self._limits, self._track = settings, scan.limits, scan.track
        self.dense, self.workers = scan.adapter, scan.workers
        with torch.no_grad():
            self.rows = WeightedRows(scan, settings)
            self._batch, limits = scan.sequences(), scan.limits
            self.targets = TargetRun(self.dense, self.rows.ids, self._batch, limits.budget, limits.overlap)

    @property
    def fit_tokens(self) -> int:
        """Tokens that weights are fitted on, of all processes; the others are held out."""
        return sum(self.workers.gather(self.rows.fitted)) * self.rows.ids.shape[1]

    @property
    def holds_targets(self) -> bool:
        """Whether the dense targets of all layers stay in memory, so that another walk costs no dense pass."""
        return self.targets.holds_all

    def places(
        self,
        small: DiffusionLM,
        remaining: Sequence[int] | None = None,
        title: str = "refit",
        last: int | None = None,
        experts: Mapping[int, Sequence[int]] | None = None,
    ) -> Iterator["Place | MixturePlace"]:
        """Every consumer of a cut model, in the order of the forward pass.

        The weights that a place has when the next one is asked for are those its output is computed with.

        Args:
            remaining: the dense model's index of every block of `small` (`Plan.remaining`); None where all are there.
            title: of the progress bar over blocks.
            last: the dense model's index of the last block whose attention counts; None: of the last that has one.
            experts: the experts that are left of every block of the dense model (`Plan.experts`); None: all.
        Returns:
            A `Place` for each, and a `MixturePlace` for all experts of a block.
        Raises:
            ValueError: not one index for every block.
        """
        pruned, dense = Adapter(small), self.dense.blocks
        indices = range(len(dense)) if remaining is None else remaining
        blocks = dict(zip(indices, pruned.blocks, strict=True))  # index in the dense model -> block
        self.targets.restart()
        run = ResidualRun(pruned, self.rows.ids, self._batch, self._limits.budget, self._limits.overlap)
        first, last = True, indices[pruned.attending[-1].index] if last is None else last
        for block in self._track(dense, title):
            left = blocks.get(block.index)
            for kind in block.kinds:
                if left is not None and kind in left.kinds:
                    yield Place(self, run, block, left, kind, first, block.index >= last)
                    give_back_memory()  # what the refit of this place read of weights on disk
                    run.advance((left.index, kind))
                first = False
                if self.settings.target != "layer":  # also past what the small model lacks
                    self.targets.advance((block.index, kind))
            if block.mixture:
                first = False
                if left is not None and left.mixture:
                    numbers = range(block.mixture.experts) if experts is None else experts[block.index]
                    share = dense_share(self.settings)
                    yield MixturePlace(self, run, block, left, numbers, block.index >= last, share)
                    run.pass_mixture(left.index)
                if self.settings.target != "layer":
                    self.targets.pass_mixture(block.index)

    def final_products(self, run: ResidualRun, small: DiffusionLM) -> tuple[Products, Products]:
        """Of what the LM head reads, at positions with a prediction, after all places; the target is the dense
        model's. Over fitted and over held-out rows: Gram matrix (C, C) and cross products (C, C), fp32."""
        device, size = self.dense.device, self.dense.hidden_size
        sums = {
            fitted: [empty_sum(size, size, device), empty_sum(size, size, device), empty_sum(1, 1, device)]
            for fitted in (True, False)
        }
        for rows in run.slices():
            for part, fitted in self.parts(rows):
                weight = self.rows.weight(part, True, device)  # (b, T)
                pruned = small.final_norm(run.states(part))  # (b, T, C)
                dense = self.dense.model.final_norm(self.targets.states(part))  # (b, T, C)
                add_gram(sums[fitted][0], pruned, weight)
                add_products(sums[fitted][1], dense, pruned, weight)
                if not fitted:
                    sums[fitted][2] += (dense.float() * weight[..., None]).pow(2).sum()
        self.workers.add_up(*sums[True], *sums[False])
        return Products.of_sums(sums[True]), Products.of_sums(sums[False])

    def parts(self, rows: slice) -> list[tuple[slice, bool]]:
        """A batch's rows split into fit and held-out parts: (rows, whether they are fitted)."""
        edge, stop = self.rows.fitted, min(rows.stop, len(self.rows.ids))
        parts = [(slice(rows.start, min(stop, edge)), True), (slice(max(rows.start, edge), stop), False)]
        return [(part, fitted) for part, fitted in parts if part.start < part.stop]


@dataclass(frozen=True, eq=False)
class Place:
    """The consumer of one kind of unit in a block of the dense model, and the same in what is left of the block."""

    walk: Walk
    run: ResidualRun  # of the small model
    dense: BlockView
    small: BlockView
    kind: str
    first: bool  # it reads the embeddings, which pruning leaves as they are
    predicting: bool  # its output is read only at positions with a prediction: no attention follows

    @property
    def key(self) -> UnitKey:
        """Of the dense model's consumer."""
        return self.dense.index, self.kind

    @property
    def consumer(self) -> torch.nn.Linear:
        """The small model's."""
        return self.small[CONSUMER[self.kind]]

    @property
    def readers(self) -> dict[str, torch.nn.Linear]:
        """Role -> linears of the small model that read the residual stream here."""
        return {role: self.small[role] for role in self.small.readers[STREAM_READERS[self.kind]]}

    def reader_products(self) -> tuple[InputProducts, InputProducts]:
        """Products of `readers`, whose targets are what they give in the dense model; fitted and held-out rows."""
        name, targets, device = STREAM_READERS[self.kind], self.walk.targets, self.walk.dense.device
        sums = {fitted: RowSums(self.readers, device, cross=True, power=not fitted) for fitted in (True, False)}
        predicting = self.predicting and self.kind != "attention"  # keys and values are read at all positions
        for rows in self.run.slices():
            for part, fitted in self.walk.parts(rows):
                pruned = self.small.read(name, self.run.states(part))  # (b, T, C)
                dense = self.dense.read(name, targets.states(part))  # (b, T, C)
                weight = self.walk.rows.weight(part, predicting, device, self.key)  # (b, T)
                sums[fitted].add(pruned, dense, weight)
        return sums[True].finish(self.walk.workers), sums[False].finish(self.walk.workers)

    def products(self) -> tuple[Products, Products]:
        """Of the consumer: over the fit rows (weighted by ω²) and over the held-out masked tokens, fp32.

        With a constant feature it is the last one. A refit of the bias alone needs no more than its column, which is
        fp64: the mean residual is a small difference of large sums.
        """
        settings, walk, run = self.walk.settings, self.walk, self.run
        sums: dict[bool, list] = {}
        for rows in run.slices():
            for part, fitted in walk.parts(rows):
                inner = slice(part.start - rows.start, part.stop - rows.start)
                x = run.read((self.small.index, self.kind), rows)[inner]  # (b, T, K)
                target = self._target(rows)[inner]  # (b, T, O)
                if has_constant(settings):
                    x = torch.cat((x, torch.ones_like(x[..., :1])), dim=-1)  # (b, T, K + 1)
                weight = walk.rows.weight(part, self.predicting, x.device, self.key)  # (b, T)
                if settings.relative:
                    weight = relative_weight(run.states(part), weight)  # (b, T)
                mean = fitted and settings.mode == "bias"  # a bias alone is fitted to it
                if fitted not in sums:
                    power = empty_sum(1, 1, x.device)  # read only after the last batch
                    columns = 1 if mean else x.shape[-1]
                    sides = (empty_sum(side.shape[-1], columns, x.device) for side in (x, target))
                    sums[fitted] = [*sides, power]
                if mean:
                    add_rows(sums[fitted][0], x, weight)
                    add_rows(sums[fitted][1], target, weight)
                else:
                    add_gram(sums[fitted][0], x, weight)
                    add_products(sums[fitted][1], target, x, weight)
                if not fitted:
                    sums[fitted][2] += (target.float() * weight[..., None]).pow(2).sum()
        walk.workers.add_up(*sums[True], *sums[False])
        return Products.of_sums(sums[True]), Products.of_sums(sums[False])

    def _target(self, rows: slice) -> torch.Tensor:
        """The target output: the dense model's, the dense layer's on this prefix, or between them, (b, T, O).

        With `reconstruct.stream` that share of what the pruned residual stream lacks here is added to it.
        Without a constant feature the consumer's bias does not change, so it is not part of the target.
        """
        linear, share = self.dense[CONSUMER[self.kind]], dense_share(self.walk.settings)
        target = self.walk.targets.output(self.key, rows) if share > 0 else None  # (b, T, O)
        if share < 1:
            own = linear(self.run.compute(self.kind, self.run.states(rows), self.dense))  # (b, T, O)
            target = own if target is None else own.lerp(target, share)  # (b, T, O)
        assert target is not None
        if stream := self.walk.settings.stream:
            lacking = self.walk.targets.states(rows) - self.run.states(rows)  # (b, T, O), as wide as the stream
            target = target + stream * lacking  # (b, T, O)
        without_bias = has_constant(self.walk.settings) or linear.bias is None
        return target if without_bias else target - linear.bias.to(target.device)


def has_constant(settings: ReconstructSettings) -> bool:
    """Whether a constant feature is appended to the consumers' inputs."""
    return settings.constant or settings.mode == "bias"


def dense_share(settings: ReconstructSettings) -> float:
    """The dense model's share of the target outputs."""
    return {"dense": 1.0, "layer": 0.0, "mixed": settings.dense_share}[settings.target]
