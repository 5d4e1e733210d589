"""A whole unstructured or N:M run on one screen: calibration -> statistics -> masks -> refit -> check -> report."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from structprune.calibration.batches import Calibration
from structprune.calibration.build import CHECK_SEED, calibrate, held_out_noise
from structprune.calibration.noise import level_times
from structprune.checkpoint.card import mask_card
from structprune.checkpoint.masked import save_masked
from structprune.checkpoint.report import mask_report
from structprune.config import Config
from structprune.effects import check_masking
from structprune.errors import UserError
from structprune.evaluation.compare import paired_difference
from structprune.evaluation.nelbo import Nelbo, masked_nelbo
from structprune.masking.allocate import block_ratios, outlier_share
from structprune.masking.blocks import Request, install, mask_block, refit_block
from structprune.masking.masks import Masks, pack_bits
from structprune.masking.patterns import check_pattern, parse_nm
from structprune.masking.rows import reads_text, walked, wanted_rows
from structprune.masking.table import resolve_score
from structprune.masking.walk import BlockStatistics, Walk
from structprune.masking.wanda import wanda_scores
from structprune.models.adapter import READERS, Adapter
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import give_back_memory, stream_target, streamed
from structprune.statistics.inputs import Key
from structprune.statistics.norms import one_shot_norms
from structprune.statistics.rows import Track, untracked
from structprune.structured.reconstruct import LayerFit

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


def removed_ratio(config: Config) -> float:
    """The removed share of every projection that a configuration asks for.

    Raises:
        UserError: N:M with another ratio than N / M.
    """
    asked = config.masking.ratio
    if config.method != "nm":
        return 0.5 if asked is None else asked
    removed, group = parse_nm(config.masking.nm)
    if asked not in (None, removed / group):
        ratio = f"masking.ratio = {asked} contradicts masking.nm = {config.masking.nm}"
        raise UserError(f"{ratio}, which removes {removed / group:g}: leave it out (null), or use method unstructured")
    return removed / group


def check_mask_request(model: DiffusionLM, config: Config) -> tuple[str, str | None]:
    """Raise what a run would fail on later, before any forward pass; model may be on the meta device.

    Returns:
        The score without its `sink-`, and the arm it runs on.
    Raises:
        UserError: the first choice that cannot be met or has no effect.
    """
    if config.method == "structured":
        raise UserError("method = structured makes no masks: set it to unstructured or nm")
    base, arm = resolve_score(config.masking.score, config.masking.arm)
    check_masking(config, base, arm, reads_text(config, arm))
    ratio = removed_ratio(config)
    if config.method == "nm":
        check_pattern(Adapter(model).blocks, config.masking.nm)
        if config.masking.allocation != "uniform":
            asked = f"masking.allocation = {config.masking.allocation}"
            raise UserError(f"{asked} varies the ratio over blocks, which N:M fixes at {ratio:g}: use uniform")
    if config.masking.allocation != "owl":  # which the activations decide
        block_ratios(config.masking, ratio, block_sizes(Adapter(model)), None)
    calibration = config.calibration
    if config.reconstruct.enabled and calibration.held_out < 1 and not calibration.replays:
        raise UserError(
            "calibration.held_out = 0 leaves nothing to choose the refit's damping on: set it, or"
            " reconstruct.enabled = false"
        )
    if reads_text(config, arm) and not calibration.replays:
        level_times(calibration.steps, calibration.interval)
    return base, arm


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
        self.calibration = (calibration or calibrate(model, config)) if reads else None
        if reads and self.calibration.held_out >= self.calibration.windows:
            raise UserError("every window of the calibration is held out, which leaves none to look at: hold out fewer")
        if config.reconstruct.enabled and self.calibration.held_out < 1:
            raise UserError("no window is held out to choose the refit's damping on: set reconstruct.enabled = false")
        self.seconds: dict[str, float] = {}
        self._batch, self._budget = config.calibration.batch, int(config.memory.budget_gb * 1e9)
        self._norms: dict[Key, torch.Tensor] = {}

    def _timed(self, name: str, work):
        start = time.perf_counter()
        value = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return value

    def run(self, in_place: bool = False) -> Masked:
        """Mask the model, or a copy that shares everything but its projections."""
        start = time.perf_counter()
        dense = self._nelbo(self.model)
        model = self.model if in_place else unshared(self.model)
        adapter = Adapter(model)
        with streamed(model, self._target), torch.no_grad():
            ratios = self._ratios(adapter)
            masks, factored, fits = self._mask_blocks(adapter, ratios)
        after = self._nelbo(model)
        self.seconds["total"] = time.perf_counter() - start
        check = None
        if dense is not None:
            check = {
                "dense": dense.mean,
                "masked": after.mean,
                "loss": paired_difference(after.nelbo, dense.nelbo),
                "windows": self.calibration.held_out,
                "seed": CHECK_SEED + self.config.calibration.seed,
            }
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
        }
        return Masked(model, masks, self.calibration, report)

    def _nelbo(self, model: DiffusionLM) -> Nelbo | None:
        if self.calibration is None or self.calibration.held_out == 0:
            return None
        noise = held_out_noise(self.calibration, model, self.config.calibration.seed)
        with streamed(model, self._target):
            return self._timed("check", lambda: masked_nelbo(model, *noise, batch=self._batch))

    def _ratios(self, adapter: Adapter) -> list[float]:
        """The removed ratio of every block; measures norms of the dense model where score or allocation needs them."""
        masking, config = self.config.masking, self.config
        one_shot = self.arm is not None and not walked(config, self.base)
        if one_shot or masking.allocation == "owl":
            arguments = (adapter, self.calibration.fit, self.arm or OUTLIER_ARM, config.sink, masking.norms == "summed")
            more = (masking.relative, self._batch, self._budget, self.track)
            self._norms = self._timed("statistics", lambda: one_shot_norms(*arguments, *more))
        outliers = None
        if masking.allocation == "owl":
            outliers = [outlier_share(self._outlier_scores(block), masking.owl_threshold) for block in adapter.blocks]
        return block_ratios(masking, removed_ratio(config), block_sizes(adapter), outliers)

    def _outlier_scores(self, block) -> list[torch.Tensor]:
        norms = {role: self._norms[block.index, name] for name, roles in READERS.items() for role in roles}
        return [wanda_scores(block[role].weight.to(norm.device), norm) for role, norm in norms.items()]

    def _mask_blocks(self, adapter: Adapter, ratios: list[float]):
        """Mask block after block: the masks, and how Grams were factored and refits chosen."""
        config = self.config
        nm = parse_nm(config.masking.nm) if config.method == "nm" else None
        arguments = (adapter, self.calibration, config, self.base, self.arm, self.track)
        wanted = self._timed("sinks", lambda: wanted_rows(*arguments))
        walk = Walk(adapter, wanted, self._batch, self._budget) if wanted else None
        masks, factored, fits = Masks({}, {}), [], []
        title = config.masking.score + (f" ({self.arm})" if self.arm else "")
        for block in self.track(adapter.blocks, title):
            found = self._timed("statistics", lambda: walk.measure(block)) if walk else BlockStatistics({}, {}, {}, {})
            if not found.score:
                found.score.update({name: self._norms[block.index, name] for name in READERS if self._norms})
            for name in READERS:  # input by input, so that the new weights of one are all there is beside the old
                kept, noted, chosen = self._mask_input(
                    block, name, found, Request(ratios[block.index], nm), adapter.device
                )
                factored, fits = factored + noted, fits + chosen
                for role, mask in kept.items():
                    weight = f"{block.names[role]}.weight"
                    masks.packed[weight], masks.shapes[weight] = pack_bits(mask).cpu(), tuple(mask.shape)
            if walk:
                self._timed("statistics", lambda: walk.advance(block))
            del found
            give_back_memory()
        return masks, factored, fits

    def _mask_input(self, block, name: str, found: BlockStatistics, request: Request, device: torch.device):
        """Mask, refit and put in place what reads one input of a block: masks by role, and notes."""
        arguments = (block, self.base, self.config.masking, request, found.score, device, (name,))
        masked, factored = self._timed("masks", lambda: mask_block(*arguments))
        fits: list[LayerFit] = []
        if self.config.reconstruct.enabled:
            masked, fits = self._timed("refit", lambda: refit_block(block, masked, found, self.config.reconstruct))
        install(block, masked)
        return {role: kept for role, (_, kept) in masked.items()}, factored, fits


def block_sizes(adapter: Adapter) -> list[int]:
    """Weights of the seven projections of every block."""
    return [sum(block[role].weight.numel() for role in block.names) for block in adapter.blocks]


def unshared(model: DiffusionLM) -> DiffusionLM:
    """A copy of a model whose projections can be replaced without changing it; tensors are shared until then."""
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    copy.source = getattr(model, "source", None)
    return copy.eval()
