"""Closed-form refit of what is left after removal, in delta form (docs/methods.md section 5).

Pure functions of Gram matrices, and a driver that walks a dense and a pruned model side by side: attention first,
then the MLP on the refitted attention's output, each on activations of the already pruned prefix.
Shapes: O outputs, C all input channels, K kept ones.
"""

from dataclasses import asdict, dataclass

import torch

from structprune.calibration.batches import Calibration
from structprune.config import ReconstructSettings, SinkSettings
from structprune.models.adapter import CONSUMER, Adapter
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.transfer import send
from structprune.statistics.activations import add_gram, add_products, mirror, relative_weight
from structprune.statistics.residual import ResidualRun, TargetRun
from structprune.statistics.rows import Observe, Track, arm_rows, unobserved, untracked
from structprune.structured.paths import KINDS
from structprune.structured.scores.ranking import Limits, calibration_rows

NEVER = float("inf")  # the damping at which nothing changes: plain removal


def refit_weight(
    kept: torch.Tensor, wanted: torch.Tensor, gram: torch.Tensor, damping: float, features: int
) -> torch.Tensor | None:
    """W_new = W_K + (W·C - W_K·G)(G + λI)⁻¹, the minimiser of ‖W_new X̂_Kᵀ - W Xᵀ‖² + λ‖W_new - W_K‖².

    Args:
        kept: (O, K) W_K. gram: (K, K) G = X̂_KᵀX̂_K.
        wanted: (O, K) W·C = W XᵀX̂_K, the wanted outputs times what is left of the inputs.
        damping: λ relative to the mean diagonal of G over its first `features` rows; infinity returns W_K.
        features: number of real features, so that an appended constant does not move λ.
    Returns:
        (O, K), or None where G + λI is not positive definite.
    """
    return kept if damping == NEVER else _moved(kept, _gap(kept, wanted, gram), gram, damping, features)


def _moved(
    kept: torch.Tensor, gap: torch.Tensor, gram: torch.Tensor, damping: float, features: int
) -> torch.Tensor | None:
    """W_K + gap (G + λI)⁻¹ of `refit_weight`, gap (O, K) being what all dampings share."""
    factor, failed = torch.linalg.cholesky_ex(_ridge(gram, damping, features))  # the ridge goes before the solve
    if failed:  # the device is waited for, once a candidate and layer: less than the factorisation takes
        return None
    return torch.cholesky_solve(gap.T, factor).T.add_(kept)  # (O, K)


def _gap(kept: torch.Tensor, wanted: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """W·C - W_K·G, (O, K) fp64."""
    return (kept @ gram.double()).neg_().add_(wanted)  # (O, K)


def _ridge(gram: torch.Tensor, damping: float, features: int) -> torch.Tensor:
    """G + λI, (K, K) fp64, with λ as in `refit_weight`."""
    ridge = gram.to(torch.float64, copy=True)  # (K, K)
    ridge.diagonal().add_(damping * ridge.diagonal()[:features].mean())
    return ridge


def output_error(weight: torch.Tensor, wanted: torch.Tensor, gram: torch.Tensor) -> float:
    """‖W_new X̂ᵀ - W Xᵀ‖² less the part that no W_new changes: tr(W_new G W_newᵀ) - 2 tr(W_new (W·C)ᵀ)."""
    return output_errors(weight[None], wanted, gram)[0]


def output_errors(weights: torch.Tensor, wanted: torch.Tensor, gram: torch.Tensor) -> list[float]:
    """`output_error` of several weights (n, O, K), brought to the host at once."""
    terms = (weights @ gram.double()).sub_(wanted, alpha=2)  # (n, O, K)
    return terms.mul_(weights).sum((1, 2)).tolist()


def refit_bias(kept: torch.Tensor, wanted: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Only the constant's weight moves, by the mean residual of the output (FLAP's compensation).

    Args:
        kept: (O, K), the constant as last feature.
        wanted: (O, 1) W·C and gram: (K, 1) G, of which this needs the last column only (more do no harm).
    """
    residual = wanted[:, -1] - kept @ gram[:, -1].double()  # (O,)
    moved = kept.clone()  # (O, K)
    moved[:, -1] += residual / gram[-1, -1]
    return moved


@dataclass(frozen=True)
class Products:
    """Second moments of one consumer: gram (K, K), wanted (O, K), and the power ‖W Xᵀ‖² of the wanted output.

    They may be the fp32 sums that they were collected in: fp64 copies, made where they are used and gone then, would be
    the peak of memory.
    """

    gram: torch.Tensor
    wanted: torch.Tensor
    power: float


@dataclass(frozen=True)
class LayerFit:
    """What the refit of one consumer chose: damping (infinity: nothing changed), held-out output error, plain = 1."""

    block: int
    kind: str
    damping: float
    error: float

    def plain(self) -> dict:
        """As JSON has it: infinity is null."""
        return asdict(self) | {"damping": None if self.damping == NEVER else self.damping}


def choose(
    settings: ReconstructSettings, kept: torch.Tensor, fit: Products, check: Products, features: int
) -> tuple[torch.Tensor, float, float]:
    """The candidate with the least held-out output error; plain removal is always among them.

    Returns:
        (weight, damping, its held-out error less plain removal's)
    """
    plain = output_error(kept, check.wanted, check.gram)
    best = (kept, NEVER, 0.0)
    if settings.mode == "bias":
        candidates = [(refit_bias(kept, fit.wanted, fit.gram), 0.0)]
    else:
        gap = _gap(kept, fit.wanted, fit.gram)  # (O, K)
        # one after the other: factors of all at once would be the peak of memory
        candidates = ((_moved(kept, gap, fit.gram, value, features), value) for value in sorted(settings.damping))
    for weight, damping in candidates:
        if weight is None:
            continue
        gain = output_error(weight, check.wanted, check.gram) - plain
        if gain < best[2]:
            best = (weight, damping, gain)
    return best


class Reconstructor:
    """Refits pruned copies of one dense model; the dense side is measured once where it fits the budget."""

    def __init__(
        self, model: DiffusionLM, calibration: Calibration, settings: ReconstructSettings, sink: SinkSettings,
        limits: Limits = Limits(), track: Track = untracked, observe: Observe = unobserved,
    ):  # fmt: skip
        self.settings, self._limits, self._track = settings, limits, track
        self._dense = Adapter(model)
        with torch.no_grad():
            rows = calibration_rows(self._dense, calibration.fit, settings.arm, sink, limits, track, observe)
            held_out = arm_rows(calibration.check, "masked", sink, None, self._dense.mask_id)
            self._fit_rows = len(rows.ids)
            self._ids = torch.cat((rows.ids, held_out.ids))  # (R, T)
            fit_weight = torch.ones(rows.ids.shape) if rows.weight is None else rows.weight  # (R1, T)
            self._weight = torch.cat((fit_weight, held_out.masked.float()))  # (R, T)
            self._batch = limits.sequences(calibration.levels, calibration.length)
            self._run = TargetRun(self._dense, self._ids, self._batch, limits.budget, limits.overlap)

    @property
    def kept(self) -> bool:
        """Whether the dense targets are held for good."""
        return self._run.kept

    @torch.no_grad()
    def refit(self, small: DiffusionLM) -> list[LayerFit]:
        """Refit every consumer of a cut model in place.

        Args:
            small: from `apply_plan`; its consumers must have biases where a constant feature is asked for.
        """
        pruned = Adapter(small)
        self._run.restart()
        run = ResidualRun(pruned, self._ids, self._batch, self._limits.budget, self._limits.overlap)
        fits = []
        for index in self._track(range(len(pruned.blocks)), "refit"):
            for kind in KINDS:
                fits.append(self._refit_consumer(pruned, run, (index, kind)))
                run.advance((index, kind))
                if self.settings.target == "dense":
                    self._run.advance((index, kind))
        return fits

    def _refit_consumer(self, pruned: Adapter, run: ResidualRun, key) -> LayerFit:
        linear = pruned.blocks[key[0]][CONSUMER[key[1]]]
        fit, check = self._products(run, key)
        weight = _augmented(linear, self._constant).to(fit.gram.device)  # (O, K) fp64
        chosen, damping, gain = choose(self.settings, weight, fit, check, linear.in_features)
        linear.weight = _parameter(chosen[:, :-1] if self._constant else chosen, linear.weight)
        if self._constant:
            linear.bias = _parameter(chosen[:, -1], linear.bias)
        plain = output_error(weight, check.wanted, check.gram) + check.power
        return LayerFit(key[0], key[1], damping, (plain + gain) / plain if plain > 0 else 1.0)

    @property
    def _constant(self) -> bool:
        return self.settings.constant or self.settings.mode == "bias"

    def _products(self, run: ResidualRun, key) -> tuple[Products, Products]:
        """Products over the fit rows (weighted by ω²) and over the held-out masked tokens, fp32."""
        sums: dict[bool, list] = {}
        for rows in run.slices():
            for part, fitted in self._parts(rows):
                inner = slice(part.start - rows.start, part.stop - rows.start)
                x, target = run.read(key, rows)[inner], self._target(run, key, rows)[inner]  # (b, T, K), (b, T, O)
                if self._constant:
                    x = torch.cat((x, torch.ones_like(x[..., :1])), dim=-1)  # (b, T, K + 1)
                weight = send(self._weight[part], x.device)  # (b, T)
                if self.settings.relative:
                    weight = relative_weight(run.states(part), weight)  # (b, T)
                # the mean is all that the bias alone is fitted to
                right = x[..., -1:] if fitted and self.settings.mode == "bias" else x  # (b, T, K or 1)
                if fitted not in sums:
                    shapes = [(side.shape[-1], right.shape[-1]) for side in (x, target)]
                    power = torch.zeros((), dtype=torch.float64, device=x.device)  # read after the last batch only
                    sums[fitted] = [*(torch.zeros(shape, device=x.device) for shape in shapes), power]
                if right is x:
                    add_gram(sums[fitted][0], x, weight)
                else:
                    add_products(sums[fitted][0], x, right, weight)
                add_products(sums[fitted][1], target, right, weight)
                if not fitted:
                    sums[fitted][2] += (target.float() * weight[..., None]).pow(2).sum()
        return tuple(
            Products(mirror(gram) if len(gram) == gram.shape[1] else gram, wanted, float(power))
            for gram, wanted, power in (sums[True], sums[False])
        )

    def _target(self, run: ResidualRun, key, rows: slice) -> torch.Tensor:
        """The output the refit aims at: the dense model's, or the dense layer's on this prefix, (b, T, O).

        Without a constant feature the consumer's bias, which pruning leaves as it is, is not part of it.
        """
        linear = self._dense.blocks[key[0]][CONSUMER[key[1]]]
        if self.settings.target == "dense":
            target = self._run.output(key, rows)  # (b, T, O)
        else:
            target = linear(run.compute(key, run.states(rows), self._dense))  # (b, T, O)
        return target if self._constant or linear.bias is None else target - linear.bias.to(target.device)

    def _parts(self, rows: slice) -> list[tuple[slice, bool]]:
        """A batch's rows as fit and held-out parts: (rows, whether they are for the fit)."""
        edge, stop = self._fit_rows, min(rows.stop, len(self._ids))
        parts = [(slice(rows.start, min(stop, edge)), True), (slice(max(rows.start, edge), stop), False)]
        return [(part, fitted) for part, fitted in parts if part.start < part.stop]


def _augmented(linear: torch.nn.Linear, constant: bool) -> torch.Tensor:
    """The weight, with the bias (else 0) as a last column where a constant feature is used: (O, C [+ 1]) fp64."""
    weight = linear.weight.double()  # (O, C)
    if not constant:
        return weight
    bias = linear.bias.double() if linear.bias is not None else torch.zeros_like(weight[:, 0])  # (O,)
    return torch.cat((weight, bias[:, None]), dim=1)


def _parameter(value: torch.Tensor, like: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(value.to(like.device, like.dtype), requires_grad=like.requires_grad)
