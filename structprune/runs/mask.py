"""A whole unstructured or N:M run on one screen: calibration -> statistics -> masks -> refit -> check -> report."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from structprune.calibration.batches import Calibration
from structprune.calibration.build import CHECK_SEED, held_out_noise
from structprune.calibration.trajectories import calibrated
from structprune.checkpoint.card import mask_card
from structprune.checkpoint.masked import save_masked
from structprune.checkpoint.report import mask_report
from structprune.config import Config
from structprune.errors import UserError
from structprune.evaluation.compare import paired_difference
from structprune.evaluation.nelbo import Nelbo, masked_nelbo
from structprune.masking.allocate import block_ratios, outlier_share
from structprune.masking.blocks import Request, install, mask_block, refit_linears
from structprune.masking.masks import Masks, pack_bits
from structprune.masking.patterns import parse_nm
from structprune.masking.plain import PlainWeights
from structprune.masking.rows import reads_text, walked, wanted_rows
from structprune.masking.scores.wanda import wanda_scores
from structprune.masking.walk import Walk
from structprune.models.adapter import READERS, Adapter, BlockView
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import give_back_memory, stream_target, streamed, synchronise
from structprune.runs.mask_request import block_sizes, check_mask_request, removed_ratio
from structprune.statistics.inputs import Key
from structprune.statistics.norms import one_shot_norms
from structprune.statistics.rows import Track, untracked
from structprune.statistics.sink_log import SinkLog

OUTLIER_ARM = "masked"  # what `owl` looks at where the score looks at no activations


@dataclass(frozen=True)
class Masked:
    """What a run made.

    Attributes:
        model: the masked model, in eval mode.
        masks: which weights are kept.
        calibration: what the run looked at; None where nothing needs text.
        report: every figure of the run, as plain data.
    """

    model: DiffusionLM
    masks: Masks
    calibration: Calibration | None
    report: dict

    def save(self, directory: str | Path, overwrite: bool = False) -> Path:
        """Write a checkpoint in the layout of its source, with masks.safetensors, report.json, a model card and
        calibration.safetensors beside it, whole or not at all.

        Raises:
            UserError: as `structprune.checkpoint.masked.save_masked`.
        """
        files = {
            "masks.safetensors": self.masks.save,
            "report.json": self.report,
            "README.md": mask_card(self.report),
        }
        if self.calibration is not None:
            files["calibration.safetensors"] = self.calibration.save
        return save_masked(self.model, directory, changed=self.masks.packed, files=files, overwrite=overwrite)


def mask(
    model: DiffusionLM,
    config: Config | None = None,
    calibration: Calibration | None = None,
    track: Track = untracked,
    in_place: bool = False,
) -> Masked:
    """Set the least weights of every projection to zero, update what is left, and check it on held-out windows.

    Args:
        model: from `structprune.load_model`.
        config: `method` is unstructured (default here) or nm.
        calibration: default what `config` describes.
        track: wraps iterations that take long, `track(items, title)`.
        in_place: change `model` itself, which saves a copy of its projections.
    Raises:
        UserError: a request that cannot be met, in one line, before any forward pass.
    """
    return MaskRun(model, config or Config(method="unstructured"), calibration, track).run(in_place)


class MaskRun:
    """One run; `run` does it. Arguments as `mask`."""

    def __init__(self, model: DiffusionLM, config: Config, calibration: Calibration | None, track: Track):
        self.model, self.config, self.track = model, config, track
        self.base, self.arm = check_mask_request(model, config)
        self._target = stream_target(config.memory.offload, config.model.device)
        reads = reads_text(config, self.arm)
        if calibration is not None and not reads:
            raise UserError("nothing of this run looks at a calibration: leave it out, or set calibration.held_out")
        self.calibration = calibrated(model, config, calibration, track) if reads else None
        if reads and self.calibration.held_out >= self.calibration.windows:
            raise UserError("every window of the calibration is held out, which leaves none to look at: hold out fewer")
        if config.reconstruct.enabled and self.calibration.held_out < 1:
            raise UserError("no window is held out to choose the refit's damping on: set reconstruct.enabled = false")
        self.seconds: dict[str, float] = {}
        self._batch, self._budget = config.calibration.batch, int(config.memory.budget_gb * 1e9)
        self._norms: dict[Key, torch.Tensor] = {}
        self._sinks = SinkLog()

    def _timed(self, name: str, work):
        synchronise(self._target or self.model.device)
        start = time.perf_counter()
        value = work()
        synchronise(self._target or self.model.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return value

    def _streamed(self, model: DiffusionLM):
        return streamed(model, self._target, self.config.memory.overlap)

    def run(self, in_place: bool = False) -> Masked:
        """Mask the model, or a copy that shares everything but its projections."""
        start = time.perf_counter()
        dense = self._nelbo(self.model)
        model = unshared(self.model)  # where in place, one block's dense weights at most are held beside the new
        plain = PlainWeights(Adapter(model), self._budget) if self.config.reconstruct.enabled else None
        with self._streamed(self.model), self._streamed(model), torch.no_grad():
            ratios = self._ratios()
            masks, factored, fits = self._mask_blocks(Adapter(model), ratios, plain, in_place)
        check = self._check(model, dense, plain)
        if in_place:
            for new, old in zip(Adapter(model).blocks, Adapter(self.model).blocks):
                hand_over(new, old, tuple(new.names))
            model = self.model
        self.seconds["total"] = time.perf_counter() - start
        device = self._target or model.device
        report = mask_report(model, masks, self.config, self.calibration, self.seconds, device)
        report |= {
            "score": self.base,
            "arm": self.arm,
            "ratio": removed_ratio(self.config),
            "block_ratios": ratios,
            "held_out_nelbo": check,
            "factored": [asdict(each) for each in factored],
            "refit": [fit.plain() for fit in fits],
            "sinks": self._taken(),
        }
        return Masked(model, masks, self.calibration, report)

    def _taken(self) -> dict | None:
        """What the sink policy took."""
        if self.calibration is None:
            return None
        return self._sinks.report(self.calibration.fit, self.config.sink, self.model.config.mask_token_id)

    def _check(self, model: DiffusionLM, dense: Nelbo | None, plain: PlainWeights | None) -> dict | None:
        """What masks cost on held-out windows; a refit that is no gain there is undone."""
        if dense is None:
            return None
        after = before = self._nelbo(model)
        refitted = None
        if plain is not None:
            refitted = after
            plain.swap()
            before = self._nelbo(model)
            after = min(before, refitted, key=lambda found: math.inf if math.isnan(found.mean) else found.mean)
            if after is refitted:
                plain.swap()
        if math.isnan(after.mean):
            raise UserError("the masked model's loss is not a number in this dtype: use model.dtype = float32")
        return {
            "kept": "refit" if refitted is after else "plain masks",
            "dense": dense.mean,
            "masked": after.mean,
            "plain_masks": before.mean,
            "refit": refitted.mean if refitted else None,
            "loss": paired_difference(after.nelbo, dense.nelbo),
            "windows": self.calibration.held_out,
            "seed": CHECK_SEED + self.config.calibration.seed,
        }

    def _nelbo(self, model: DiffusionLM) -> Nelbo | None:
        if self.calibration is None or self.calibration.held_out == 0:
            return None
        noise = held_out_noise(self.calibration, model, self.config.calibration.seed)
        with self._streamed(model):
            show = lambda items: self.track(items, "held-out check")  # noqa: E731
            return self._timed("check", lambda: masked_nelbo(model, *noise, batch=self._batch, track=show))

    def _ratios(self) -> list[float]:
        """The removed ratio of every block; measures norms of the dense model where score or allocation needs them."""
        masking, config, adapter = self.config.masking, self.config, Adapter(self.model)
        one_shot = self.arm is not None and not walked(config, self.base)
        if one_shot or masking.allocation == "owl":
            arguments = (adapter, self.calibration.fit, self.arm or OUTLIER_ARM, config.sink, masking.norms == "summed")
            more = (masking.relative, self._batch, self._budget, self.track, self._sinks.observe)
            self._norms = self._timed("statistics", lambda: one_shot_norms(*arguments, *more))
        outliers = None
        if masking.allocation == "owl":
            outliers = [outlier_share(self._outlier_scores(block), masking.owl_threshold) for block in adapter.blocks]
        return block_ratios(masking, removed_ratio(config), block_sizes(adapter), outliers)

    def _outlier_scores(self, block: BlockView) -> list[torch.Tensor]:
        norms = {role: self._norms[block.index, name] for name, roles in READERS.items() for role in roles}
        return [wanda_scores(block[role].weight.to(norm.device), norm) for role, norm in norms.items()]

    def _mask_blocks(self, adapter: Adapter, ratios: list[float], plain: PlainWeights | None, in_place: bool):
        """Mask block after block: the masks, and how Grams were factored and refits chosen."""
        config = self.config
        nm = parse_nm(config.masking.nm) if config.method == "nm" else None
        dense = Adapter(self.model)
        arguments = (dense, self.calibration, config, self.base, self.arm, self.track, self._sinks.observe)
        wanted = self._timed("sinks", lambda: wanted_rows(*arguments))
        walk = Walk(dense, adapter, wanted, self._batch, self._budget, config.memory.overlap) if wanted else None
        masks, factored, fits = Masks({}, {}), [], []
        title = config.masking.score + (f" ({self.arm})" if self.arm else "")
        for block in self.track(adapter.blocks, title):
            found = self._timed("statistics", lambda: walk.measure(block.index)) if walk else {}
            if not found:
                found = {name: self._norms[block.index, name] for name in READERS if self._norms}
            for name in READERS:  # input by input, so that a refit sees what the block lost before
                give_back_memory()  # of the pass or the input before: an MLP's Gram matrix and its factors are next
                request = Request(ratios[block.index], nm)
                kept, noted, chosen = self._mask_input(block, name, found, request, walk, plain)
                factored, fits = factored + noted, fits + chosen
                if in_place and plain is None:  # nobody looks at the dense weights again
                    hand_over(block, dense.blocks[block.index], READERS[name])
                for role, mask in kept.items():
                    weight = f"{block.names[role]}.weight"
                    masks.packed[weight], masks.shapes[weight] = pack_bits(mask).cpu(), tuple(mask.shape)
            if walk:
                self._timed("statistics", lambda: walk.advance(block.index))
            if in_place:
                hand_over(block, dense.blocks[block.index], tuple(block.names))
            give_back_memory()
        return masks, factored, fits

    def _mask_input(
        self, block: BlockView, name: str, found: dict, request: Request, walk: Walk | None, plain: PlainWeights | None
    ):
        """Mask, refit and put in place what reads one input of a block: masks by role, and notes."""
        device, fits = self._target or self.model.device, []
        arguments = (block, self.base, self.config.masking, request, found, device, (name,))
        masked, factored = self._timed("masks", lambda: mask_block(*arguments))
        if plain is not None:
            plain.put(block.index, masked)
            products = self._timed("statistics", lambda: walk.products(block.index, name))
            settings = self.config.reconstruct
            masked, fits = self._timed("refit", lambda: refit_linears(block, masked, products, settings))
        install(block, masked)
        return {role: kept for role, (_, kept) in masked.items()}, factored, fits


def hand_over(block: BlockView, other: BlockView, roles: tuple[str, ...]) -> None:
    """Give a block's projections to the same block of another model."""
    for role in roles:
        other[role].weight = block[role].weight


def unshared(model: DiffusionLM) -> DiffusionLM:
    """A copy of a model whose projections can be replaced without changing it; tensors are shared until then."""
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    copy.source = getattr(model, "source", None)
    return copy.eval()
