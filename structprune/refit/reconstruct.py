"""Closed-form refit of the remaining weights after removal, in delta form (docs/methods.md section 5).

Pure functions of Gram matrices, and a driver that walks a dense and a pruned model side by side: attention first, then
the MLP on the refitted attention's output, each on activations of the already pruned prefix.
Shapes: O outputs, C all input channels, K remaining ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from structprune.config import ReconstructSettings
from structprune.models.adapter import CONSUMER, STREAM_READERS, Adapter, BlockView
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.transfer import send
from structprune.refit.products import UNCHANGED, Choice, LayerFit, Products, RowSums, output_error
from structprune.statistics.activations import add_gram, add_products, mirror, relative_weight
from structprune.statistics.residual import ResidualRun, TargetRun
from structprune.statistics.rows import arm_rows, scan_rows
from structprune.statistics.scan import Scan


def refit_weight(
    weight: torch.Tensor, gap: torch.Tensor, gram: torch.Tensor, damping: float, features: int
) -> torch.Tensor | None:
    """W_new = W_K + (W·C - W_K·G)(G + λI)⁻¹, the minimiser of ‖W_new X̂_Kᵀ - W Xᵀ‖² + λ‖W_new - W_K‖².

    Args:
        weight: (O, K) W_K. gram: (K, K) G = X̂_KᵀX̂_K.
        gap: (O, K) of `target_gap`, which all dampings share.
        damping: λ relative to the mean diagonal of G over its first `features` rows.
        features: number of real features, so that an appended constant does not change λ.
    Returns:
        (O, K) fp64, or None where G + λI is not positive definite.
    """
    ridge = gram.to(torch.float64, copy=True)  # (K, K)
    ridge.diagonal().add_(damping * ridge.diagonal()[:features].mean())
    factor, failed = torch.linalg.cholesky_ex(ridge)  # (K, K)
    del ridge  # before the solve, whose memory is the peak
    if failed:  # one device sync per candidate and layer, which takes less than the factorisation
        return None
    return torch.cholesky_solve(gap.T, factor).T.add_(weight)  # (O, K)


def target_gap(weight: torch.Tensor, target: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """W·C - W_K·G (O, K) fp64: weight (O, K) W_K, target (O, K) W·C = W XᵀX̂_K, gram (K, K) G."""
    return (weight @ gram.double()).neg_().add_(target)  # (O, K)


def refit_bias(weight: torch.Tensor, target: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Only the weight of the constant, the last feature, changes, by the mean residual of the output (FLAP's
    compensation). Only the last columns of target (O, .) and gram (K, .) are read."""
    residual = target[:, -1] - weight @ gram[:, -1].double()  # (O,)
    moved = weight.clone()  # (O, K)
    moved[:, -1] += residual / gram[-1, -1]
    return moved


def choose(
    settings: ReconstructSettings, weight: torch.Tensor, fit: Products, check: Products, features: int
) -> Choice:
    """The candidate with the least held-out output error; plain removal is always among them."""
    plain = output_error(weight, check.target, check.gram)
    best = (weight, UNCHANGED, 0.0)
    if settings.mode == "bias":
        candidates: Iterable[tuple[torch.Tensor | None, float]] = [(refit_bias(weight, fit.target, fit.gram), 0.0)]
    else:
        gap = target_gap(weight, fit.target, fit.gram)  # (O, K)
        # one by one: the factors of all candidates together would be the peak of memory
        candidates = (
            (refit_weight(weight, gap, fit.gram, damping, features), damping) for damping in sorted(settings.damping)
        )
    for candidate, damping in candidates:
        if candidate is None:
            continue
        gain = output_error(candidate, check.target, check.gram) - plain
        if gain < best[2]:
            best = (candidate, damping, gain)
    return best


@dataclass(frozen=True)
class Counterparts:
    """The same consumer, the one of a kind of unit, in a block of the dense model and in what is left of it."""

    dense: BlockView
    small: BlockView
    kind: str


class Reconstructor:
    """Refits pruned copies of one dense model; the dense side is measured once where it fits the budget.

    Args:
        scan: of the dense model; its calibration's held-out windows choose the dampings.
    """

    def __init__(self, scan: Scan, settings: ReconstructSettings):
        self.settings, self._limits, self._track = settings, scan.limits, scan.track
        self._dense, calibration = scan.adapter, scan.calibration
        with torch.no_grad():
            rows = scan_rows(replace(scan, calibration=calibration.fit), settings.arm)
            held_out = arm_rows(calibration.check, "masked", scan.sink, None, self._dense.mask_id)
            self._fit_rows = len(rows.ids)
            self._ids = torch.cat((rows.ids, held_out.ids))  # (R, T)
            fit_weight = torch.ones(rows.ids.shape) if rows.weight is None else rows.weight  # (R1, T)
            self._weight = torch.cat((fit_weight, held_out.masked.float()))  # (R, T)
            self._batch, limits = scan.sequences(), scan.limits
            self._run = TargetRun(self._dense, self._ids, self._batch, limits.budget, limits.overlap)

    @property
    def holds_targets(self) -> bool:
        """Whether the dense targets of all layers stay in memory, so that another refit costs no dense pass."""
        return self._run.holds_all

    @torch.no_grad()
    def refit(self, small: DiffusionLM, remaining: Sequence[int] | None = None) -> list[LayerFit]:
        """Refit every consumer of a cut model in place; they need biases where a constant feature is used.

        Args:
            remaining: the dense model's index of every block of `small` (`Plan.remaining`); None where all are there.
        Returns:
            What was chosen, under the dense model's block indices.
        Raises:
            ValueError: not one index for every block.
        """
        pruned, dense = Adapter(small), self._dense.blocks
        places = range(len(dense)) if remaining is None else remaining
        blocks = dict(zip(places, pruned.blocks, strict=True))  # index in the dense model -> block
        self._run.restart()
        run = ResidualRun(pruned, self._ids, self._batch, self._limits.budget, self._limits.overlap)
        fits = []
        for block in self._track(dense, "refit"):
            left = blocks.get(block.index)
            for kind in block.kinds:
                if left is not None and kind in left.kinds:
                    if self.settings.producers and (block.index, kind) != (dense[0].index, dense[0].kinds[0]):
                        fits += self._refit_producers(run, Counterparts(block, left, kind))
                    fits.append(self._refit_consumer(run, Counterparts(block, left, kind)))
                    run.advance((left.index, kind))
                if self.settings.target != "layer":  # also past what the small model lacks
                    self._run.advance((block.index, kind))
        return fits

    def _refit_consumer(self, run: ResidualRun, pair: Counterparts) -> LayerFit:
        linear = pair.small[CONSUMER[pair.kind]]
        fit, check = self._products(run, pair)
        weight = _augmented(linear, self._constant).to(fit.gram.device)  # (O, K) fp64
        choice = choose(self.settings, weight, fit, check, linear.in_features)
        chosen = choice[0]  # (O, K)
        linear.weight = _parameter(chosen[:, :-1] if self._constant else chosen, linear.weight)
        if self._constant:
            linear.bias = _parameter(chosen[:, -1], linear.bias)
        return LayerFit.of(pair.dense.index, pair.kind, weight, check, choice)

    def _refit_producers(self, run: ResidualRun, pair: Counterparts) -> list[LayerFit]:
        """Refit the linears that read the residual stream, so that they give what they gave on the dense model's."""
        name = STREAM_READERS[pair.kind]
        linears = {role: pair.small[role] for role in pair.small.readers[name]}
        device = self._dense.device
        sums = {fitted: RowSums(linears, device, cross=True, power=not fitted) for fitted in (True, False)}
        for rows in run.slices():
            for part, fitted in self._parts(rows):
                pruned = pair.small.read(name, run.states(part))  # (b, T, C)
                dense = pair.dense.read(name, self._run.states(part))  # (b, T, C)
                sums[fitted].add(pruned, dense, send(self._weight[part], device))
        fit, check = sums[True].finish(), sums[False].finish()
        fits = []
        for role, linear in linears.items():
            weight = linear.weight.to(fit.gram.device).double()  # (O, C), rows of the dense weight
            products = check.of(role, linear.weight)
            choice = choose(self.settings, weight, fit.of(role, linear.weight), products, linear.in_features)
            linear.weight = _parameter(choice[0], linear.weight)
            fits.append(LayerFit.of(pair.dense.index, role, weight, products, choice))
        return fits

    @property
    def _constant(self) -> bool:
        return self.settings.constant or self.settings.mode == "bias"

    def _products(self, run: ResidualRun, pair: Counterparts) -> tuple[Products, Products]:
        """Products over the fit rows (weighted by ω²) and over the held-out masked tokens, fp32."""
        sums: dict[bool, list] = {}
        for rows in run.slices():
            for part, fitted in self._parts(rows):
                inner = slice(part.start - rows.start, part.stop - rows.start)
                x = run.read((pair.small.index, pair.kind), rows)[inner]  # (b, T, K)
                target = self._target(run, pair, rows)[inner]  # (b, T, O)
                if self._constant:
                    x = torch.cat((x, torch.ones_like(x[..., :1])), dim=-1)  # (b, T, K + 1)
                weight = send(self._weight[part], x.device)  # (b, T)
                if self.settings.relative:
                    weight = relative_weight(run.states(part), weight)  # (b, T)
                # a bias alone is fitted to the mean
                right = x[..., -1:] if fitted and self.settings.mode == "bias" else x  # (b, T, K or 1)
                if fitted not in sums:
                    shapes = [(side.shape[-1], right.shape[-1]) for side in (x, target)]
                    power = torch.zeros((), dtype=torch.float64, device=x.device)  # read only after the last batch
                    sums[fitted] = [*(torch.zeros(shape, device=x.device) for shape in shapes), power]
                if right is x:
                    add_gram(sums[fitted][0], x, weight)
                else:
                    add_products(sums[fitted][0], x, right, weight)
                add_products(sums[fitted][1], target, right, weight)
                if not fitted:
                    sums[fitted][2] += (target.float() * weight[..., None]).pow(2).sum()
        fit, check = (
            Products(mirror(gram) if len(gram) == gram.shape[1] else gram, target, float(power))
            for gram, target, power in (sums[True], sums[False])
        )
        return fit, check

    def _target(self, run: ResidualRun, pair: Counterparts, rows: slice) -> torch.Tensor:
        """The target output: the dense model's, the dense layer's on this prefix, or between them, (b, T, O).

        Without a constant feature the consumer's bias does not change, so it is not part of the target.
        """
        linear, share = pair.dense[CONSUMER[pair.kind]], dense_share(self.settings)
        target = self._run.output((pair.dense.index, pair.kind), rows) if share > 0 else None  # (b, T, O)
        if share < 1:
            own = linear(run.compute(pair.kind, run.states(rows), pair.dense))  # (b, T, O)
            target = own if target is None else own.lerp(target, share)  # (b, T, O)
        assert target is not None
        return target if self._constant or linear.bias is None else target - linear.bias.to(target.device)

    def _parts(self, rows: slice) -> list[tuple[slice, bool]]:
        """A batch's rows split into fit and held-out parts: (rows, whether they are fitted)."""
        edge, stop = self._fit_rows, min(rows.stop, len(self._ids))
        parts = [(slice(rows.start, min(stop, edge)), True), (slice(max(rows.start, edge), stop), False)]
        return [(part, fitted) for part, fitted in parts if part.start < part.stop]


def dense_share(settings: ReconstructSettings) -> float:
    """The dense model's share of the target outputs."""
    return {"dense": 1.0, "layer": 0.0, "mixed": settings.dense_share}[settings.target]


def _augmented(linear: torch.nn.Linear, constant: bool) -> torch.Tensor:
    """The weight, with the bias (or 0) as last column where a constant feature is used: (O, C [+ 1]) fp64."""
    weight = linear.weight.double()  # (O, C)
    if not constant:
        return weight
    bias = linear.bias.double() if linear.bias is not None else torch.zeros_like(weight[:, 0])  # (O,)
    return torch.cat((weight, bias[:, None]), dim=1)


def _parameter(value: torch.Tensor, like: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value.to(like.device, like.dtype), requires_grad=like.requires_grad)
