"""The blocks of a run for masks, one after another: statistics, masks, refit, and what the journal keeps of each."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch

from structprune.masking.blocks import Factored, fill_unseen, install, mask_readers, refit_linears
from structprune.masking.masks import Masks, pack_bits, unpack_bits
from structprune.masking.plain import PlainWeights
from structprune.masking.rows import plan_walk
from structprune.masking.scores.linears import Masked as MaskedWeight
from structprune.masking.scores.linears import Removal
from structprune.masking.walk import Walk
from structprune.models.adapter import Adapter, BlockView
from structprune.models.placement import give_back_memory
from structprune.refit.products import LayerFit

if TYPE_CHECKING:
    from structprune.runs.mask import MaskRun


class MaskedBlocks:
    """Masks the blocks of `adapter`'s model in order; collects masks, and what factorisations and refits chose."""

    def __init__(self, run: "MaskRun", adapter: Adapter, plain: PlainWeights | None, in_place: bool):
        self._run, self._adapter, self._plain, self._in_place = run, adapter, plain, in_place
        self.masks = Masks({}, {})
        self.factored: list[Factored] = []
        self.fits: list[LayerFit] = []
        self.unseen: dict[int, list[int]] = {}  # block -> experts that saw no token
        plan = None
        if run.request.reads_text:
            scan = run.scan(run.log)
            plan = run.timed("sinks", lambda: plan_walk(scan, run.request))
        whole = all(run.part.has(part_name(block)) for block in adapter.blocks)
        self._walk = Walk(run.adapter, adapter, plan, run.limits, run.workers) if plan and not whole else None

    def mask_all(self, ratios: list[float]) -> None:
        """Mask every block at its ratio."""
        run, request = self._run, self._run.request
        title = request.settings.score + (f" ({request.arm})" if request.arm else "")
        for block in run.track(self._adapter.blocks, title):
            dense = run.adapter.blocks[block.index]
            if restored := self._restore(block):
                if self._walk:
                    run.timed("statistics", partial(self._walk.skip, block.index))
            else:
                self._mask_block(block, dense, Removal(ratios[block.index], request.nm))
            if self._in_place:
                share_weights(block, dense, tuple(block.names))
            if not restored:
                self._keep(block)
            give_back_memory()

    def _mask_block(self, block: BlockView, dense: BlockView, removal: Removal) -> None:
        """Mask a block, and take the walk past it."""
        statistics = self._statistics(block.index)
        self._note_unseen(block.index, fill_unseen(block, statistics))
        for name, roles in block.readers.items():  # input by input: a refit sees the losses of earlier ones
            give_back_memory()  # freed by the step before: an MLP's Gram matrix and its factors come next
            self._mask_input(block, name, statistics, removal)
            if self._in_place and self._plain is None:  # nothing reads the dense weights again
                share_weights(block, dense, roles)
        if self._walk:
            self._run.timed("statistics", partial(self._walk.advance, block.index))

    def _keep(self, block: BlockView) -> None:
        """Keep what became of a block: weights, masks, weights before their refit, and what was chosen."""
        index, tensors = block.index, {}
        for role, name in block.names.items():
            tensors[f"{role}.weight"], tensors[f"{role}.keep"] = block[role].weight, self.masks.packed[f"{name}.weight"]
            if self._plain is not None:
                tensors[f"{role}.plain"] = self._plain.weight(index, role)
        own = {
            "factored": [asdict(each) for each in self.factored if each.block == index],
            "fits": [asdict(each) for each in self.fits if each.block == index],
        } | ({"unseen": self.unseen[index]} if index in self.unseen else {})
        self._run.part.keep(part_name(block), tensors, own)
        self._map(block)

    def _map(self, block: BlockView) -> None:
        """Where weights stay on disk, use those of the part that was kept of a block."""
        weights = {f"{role}.weight": block[role].weight for role in block.names}
        self._run.part.map_weights(part_name(block), weights)

    def _restore(self, block: BlockView) -> bool:
        """Give a block what `_keep` kept; whether anything was."""
        kept = self._run.part.read(part_name(block))
        if kept is None:
            return False
        masked, plain = {}, {}
        for role, name in block.names.items():
            bits, weight = kept.tensors[f"{role}.keep"], kept.tensors[f"{role}.weight"]  # (O, ceil(C / 8)), (O, C)
            masked[role] = (weight, unpack_bits(bits, weight.shape[1]))
            plain[role] = (kept.tensors.get(f"{role}.plain", weight), masked[role][1])
            self._note(name, bits, weight)
        install(block, masked)
        self._map(block)
        if self._plain is not None:
            self._plain.put(block.index, plain)
        self.factored += [Factored(**each) for each in kept.notes["factored"]]
        self.fits += [LayerFit(**each) for each in kept.notes["fits"]]
        self._note_unseen(block.index, kept.notes.get("unseen", []))
        return True

    def _statistics(self, index: int) -> dict[str, torch.Tensor]:
        """Input -> norms (C,) or Gram matrix (C, C) of a block, as the score needs."""
        walked = self._run.timed("statistics", partial(self._walk.measure, index)) if self._walk else {}
        return walked or self._run.dense_norms(index)

    def _mask_input(self, block: BlockView, name: str, statistics: dict, removal: Removal) -> None:
        """Mask, refit and install the linears that read one input of a block."""
        run = self._run
        masked, factored = run.timed(
            "masks", lambda: mask_readers(block, name, run.request, removal, statistics, run.device)
        )
        self.factored += factored
        if self._plain is not None and self._walk is not None:
            self._plain.put(block.index, masked)
            masked = self._refit(block, name, masked, self._walk)
        install(block, masked)
        for role, (_, keep) in masked.items():
            self._note(block.names[role], pack_bits(keep).cpu(), keep)

    def _note_unseen(self, index: int, experts: list[int]) -> None:
        if experts:
            self.unseen[index] = experts

    def _note(self, name: str, bits: torch.Tensor, like: torch.Tensor) -> None:
        """Collect the mask (O, ceil(C / 8)) of a linear, whose weight or mask (O, C) has its shape."""
        self.masks.packed[f"{name}.weight"] = bits
        self.masks.shapes[f"{name}.weight"] = (like.shape[0], like.shape[1])

    def _refit(
        self, block: BlockView, name: str, masked: dict[str, MaskedWeight], walk: Walk
    ) -> dict[str, MaskedWeight]:
        run = self._run
        products = run.timed("statistics", lambda: walk.products(block.index, name))
        work = partial(refit_linears, block, masked, products, run.request.reconstruct, run.workers)
        masked, fits = run.timed("refit", work)
        self.fits += fits
        return masked


def part_name(block: BlockView) -> str:
    """Of a block in a journal."""
    return f"block-{block.index:03d}"


def share_weights(block: BlockView, other: BlockView, roles: tuple[str, ...]) -> None:
    """Let the same block of another model use this block's projections."""
    for role in roles:
        other[role].weight = block[role].weight
