"""Refit of the weights that a cut leaves, consumer by consumer (docs/methods.md section 5).

Shapes: O outputs, C all input channels, K remaining ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from structprune.config import ReconstructSettings
from structprune.models.adapter import EXPERTS, Adapter, BlockView, UnitKey
from structprune.models.journal import NOWHERE, Journal
from structprune.models.modeling_structprune import DiffusionLM
from structprune.refit.experts import MixturePlace
from structprune.refit.products import UNCHANGED, LayerFit, as_parameter, set_weight
from structprune.refit.solve import choose
from structprune.refit.walk import Place, Walk, has_constant
from structprune.statistics.residual import ResidualRun
from structprune.statistics.scan import Scan


class Reconstructor:
    """Refits pruned copies of one dense model; the dense side is measured once where it fits the budget.

    Args:
        scan: of the dense model; its calibration's held-out windows choose the dampings.
    """

    def __init__(self, scan: Scan, settings: ReconstructSettings):
        self.settings, self.walk = settings, Walk(scan, settings)

    @property
    def holds_targets(self) -> bool:
        """Whether the dense targets of all layers stay in memory, so that another refit costs no dense pass."""
        return self.walk.holds_targets

    @torch.no_grad()
    def refit(
        self,
        small: DiffusionLM,
        remaining: Sequence[int] | None = None,
        producers: bool = True,
        journal: Journal = NOWHERE,
        experts: Mapping[int, Sequence[int]] | None = None,
    ) -> list[LayerFit]:
        """Refit every consumer of a cut model in place; they need biases where a constant feature is used.

        Args:
            remaining: the dense model's index of every block of `small` (`Plan.remaining`); None where all are there.
            experts: the experts that are left of every block of the dense model (`Plan.experts`); None: all.
            producers: refit what the settings ask for; False: of each half of a block the consumer alone.
            journal: of this refit; what it has is not computed again.
        Returns:
            What was chosen, under the dense model's block indices.
        Raises:
            ValueError: not one index for every block.
        """
        fits, run = [], None
        for place in self.walk.places(small, remaining, experts=experts):
            own = restore(place.small, place.key, journal)
            if own is None:
                own = place.refit() if isinstance(place, MixturePlace) else self._refit_half(place, producers)
                keep(place.small, place.key, own, journal)
            fits += own
            run = place.run
        if self.settings.head and run is not None:
            fits.append(refit_head(self.walk, run, small, journal))
        return fits

    def _refit_half(self, place: Place, producers: bool) -> list[LayerFit]:
        """Refit a half of a block: its producers, where they are asked for, and then its consumer."""
        fits = refit_producers(place) if producers and self.settings.producers and not place.first else []
        return [*fits, self._refit_consumer(place)]

    def _refit_consumer(self, place: Place) -> LayerFit:
        linear, constant = place.consumer, has_constant(self.settings)
        fit, check = place.products()
        weight = augmented(linear, constant).to(fit.gram.device)  # (O, K) fp64
        choice = choose(self.settings, weight, fit, check, linear.in_features, place.walk.workers)
        set_weight(linear, choice[0], constant)
        return LayerFit.of(place.dense.index, place.kind, weight, check, choice)


def finished(dense: Adapter, small: DiffusionLM, remaining: Sequence[int] | None, journal: Journal) -> list | None:
    """Restore a refit that the journal has whole, without a pass, and return what was chosen; None: it has not.

    Args:
        remaining: as in `Reconstructor.refit`, of a refit without the LM head.
    """
    indices = range(len(dense.blocks)) if remaining is None else remaining
    blocks = list(zip(indices, Adapter(small).blocks, strict=True))
    keys = [(index, kind) for index, block in blocks for kind in refit_kinds(block)]
    if journal.directory is None or not all(journal.has(part_name(key)) for key in keys):
        return None
    fits: list[LayerFit] = []
    for index, block in blocks:
        for kind in refit_kinds(block):
            fits += restore(block, (index, kind), journal) or []
    return fits


def refit_kinds(block: BlockView) -> tuple[str, ...]:
    """The places of a block that are refitted."""
    return (*block.kinds, EXPERTS) if block.mixture else block.kinds


def keep(block: BlockView, key: UnitKey, fits: list[LayerFit], journal: Journal) -> None:
    """Keep the refitted weights of a block's half, and what was chosen.

    Args:
        key: the dense model's.
    """
    tensors = _weights(block, key[1])
    journal.keep(part_name(key), tensors, [asdict(fit) for fit in fits])
    journal.map_weights(part_name(key), tensors)


def _weights(block: BlockView, kind: str) -> dict[str, torch.Tensor]:
    """The parameters of a block's half, by their names in a part."""
    linears = block.half(kind).items()
    # (O, K) and (O,) each
    return {f"{role}.{name}": value for role, linear in linears for name, value in linear.named_parameters()}


def part_name(key: UnitKey) -> str:
    """Of a block's half in a journal."""
    return f"block-{key[0]:03d}-{key[1]}"


def restore(block: BlockView, key: UnitKey, journal: Journal) -> list[LayerFit] | None:
    """Give a block's half the weights that `keep` kept, and return what was chosen; None where nothing was kept."""
    kept = journal.read(part_name(key))
    if kept is None:
        return None
    for role, linear in block.half(key[1]).items():
        linear.weight = as_parameter(kept.tensors[f"{role}.weight"], linear.weight)
        if linear.bias is not None:
            linear.bias = as_parameter(kept.tensors[f"{role}.bias"], linear.bias)
    journal.map_weights(part_name(key), _weights(block, key[1]))
    return [LayerFit(**fit) for fit in kept.notes]


def refit_producers(place: Place) -> list[LayerFit]:
    """Refit the linears that read the residual stream, so that they give what they gave on the dense model's."""
    fit, check = place.reader_products()
    fits = []
    for role, linear in place.readers.items():
        weight = linear.weight.to(fit.gram.device).double()  # (O, C), rows of the dense weight
        products = check.of(role, linear.weight)
        fitted, walk = fit.of(role, linear.weight), place.walk
        choice = choose(walk.settings, weight, fitted, products, linear.in_features, walk.workers)
        set_weight(linear, choice[0], constant=False)
        fits.append(LayerFit.of(place.dense.index, role, weight, products, choice))
    return fits


def refit_head(walk: Walk, run: ResidualRun, small: DiffusionLM, journal: Journal = NOWHERE) -> LayerFit:
    """Refit the LM head after all places, so that its logits are nearest to those of its dense inputs.

    The best linear map A from pruned to dense inputs is found once; the head W becomes W·A, whatever the vocabulary.
    """
    size, head, dense = walk.dense.hidden_size, small.output_head, walk.dense.model.output_head.weight
    if kept := journal.read("head"):
        layer, change = LayerFit(**kept.notes), kept.tensors["map"]  # (C, C) fp64
    else:
        fit, check = walk.final_products(run, small)
        identity = torch.eye(size, dtype=torch.float64, device=fit.gram.device)  # (C, C)
        choice = choose(walk.settings, identity, fit, check, size, walk.workers)
        layer, change = LayerFit.of(len(walk.dense.blocks), "head", identity, check, choice), choice[0]
        journal.keep("head", {"map": change}, asdict(layer))
    if layer.damping != UNCHANGED:
        dense = dense.to(walk.dense.dtype)  # (V, C)
        set_weight(head, dense @ change.to(dense.device, dense.dtype), constant=False)  # (V, C)
    elif head.weight is not dense:  # an earlier plan's
        set_weight(head, dense, constant=False)
    return layer


def augmented(linear: torch.nn.Linear, constant: bool) -> torch.Tensor:
    """The weight, with the bias (or 0) as last column where a constant feature is used: (O, C [+ 1]) fp64."""
    weight = linear.weight.double()  # (O, C)
    if not constant:
        return weight
    bias = linear.bias.double() if linear.bias is not None else torch.zeros_like(weight[:, 0])  # (O,)
    return torch.cat((weight, bias[:, None]), dim=1)
