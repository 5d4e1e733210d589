"""A whole unstructured or N:M run on one screen: calibration -> statistics -> masks -> refit -> check -> report."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from structprune.calibration.batches import Calibration
from structprune.checkpoint.card import mask_card
from structprune.checkpoint.masked import save_masked
from structprune.checkpoint.output import Content
from structprune.checkpoint.report import mask_report, run_report
from structprune.config import Config
from structprune.evaluation.nelbo import Nelbo
from structprune.masking.allocate import block_ratios, outlier_share
from structprune.masking.masks import Masks
from structprune.masking.plain import PlainWeights
from structprune.masking.request import MaskRequest
from structprune.masking.scores.wanda import wanda_scores
from structprune.models.adapter import Adapter, BlockView
from structprune.models.journal import NOWHERE, Journal
from structprune.models.loading import source_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track, untracked
from structprune.runs.budget import within_memory
from structprune.runs.mask_blocks import MaskedBlocks, share_weights
from structprune.runs.resolve import block_weights, resolve_masking
from structprune.runs.run import Run
from structprune.runs.stages import digest
from structprune.statistics.inputs import InputKey
from structprune.statistics.norms import one_shot_norms
from structprune.statistics.pass_parts import MASS
from structprune.statistics.rows import observe_own, whole_mass
from structprune.statistics.sink_log import SinkLog
from structprune.workers import ALONE, Workers

OUTLIER_ARM = "masked"  # read by `owl` where the score reads no activations


@dataclass(frozen=True)
class Masked:
    """The result of a run: the masked model, in eval mode, and every figure of the run as plain data."""

    model: DiffusionLM
    masks: Masks
    calibration: Calibration | None  # None where the run needs no text
    report: dict

    def save(self, directory: str | Path, overwrite: bool = False) -> Path:
        """Write a checkpoint in the layout of its source, with masks.safetensors, report.json, a model card and
        calibration.safetensors beside it, whole or not at all.

        Raises:
            UserError: as `structprune.checkpoint.masked.save_masked`.
        """
        masks = self.masks.joined(self.model) if source_of(self.model).joins else self.masks
        files: dict[str, Content] = {
            "masks.safetensors": masks.save,
            "report.json": self.report,
            "README.md": mask_card(self.report),
        }
        if self.calibration is not None:
            files["calibration.safetensors"] = self.calibration.save
        return save_masked(self.model, directory, changed=self.masks.packed, files=files, overwrite=overwrite)


def mask(
    model: DiffusionLM,
    config: Config | MaskRequest | None = None,
    calibration: Calibration | None = None,
    track: Track = untracked,
    in_place: bool = False,
    journal: Journal = NOWHERE,
) -> Masked:
    """Set the lowest-scored weights of every projection to zero, update the others, and check on held-out windows.

    Args:
        model: from `structprune.load_model`.
        config: `method` is unstructured (default here) or nm; or a request that was resolved for this model's shapes.
        calibration: default what `config` describes.
        track: wraps long iterations, `track(items, title)`.
        in_place: change `model` itself, which saves a copy of its projections.
        journal: of finished parts, which are not computed again.
    Raises:
        UserError: a request that cannot be met, in one line, before any forward pass.
    """
    if not isinstance(config, MaskRequest):
        request = resolve_masking(config or Config(method="unstructured"), model, calibration=calibration)
        config = within_memory(request, model)
    run = MaskRun(model, config, calibration, track)
    run.keep_in(journal)
    return run.run(in_place)


class MaskRun(Run):
    """One run for masks; `run` does it. Arguments as `mask`, with the request resolved."""

    def __init__(
        self,
        model: DiffusionLM,
        request: MaskRequest,
        calibration: Calibration | None,
        track: Track,
        workers: Workers = ALONE,
    ):
        super().__init__(model, request, calibration, track, workers)
        self.request, self.log = request, SinkLog()
        self._norms: dict[InputKey, torch.Tensor] = {}

    def run(self, in_place: bool = False) -> Masked:
        """Mask the model, or a copy that shares everything but its projections."""
        start = time.perf_counter()
        self.generate()
        holds_out = self._calibration is not None and self._calibration.held_out > 0
        dense = self.kept_nelbo("dense", lambda: self.model) if holds_out else None
        model = unshared(self.model)  # in place, at most one block's dense weights are held beside the new ones
        refits = self.request.reconstruct.enabled
        plain = PlainWeights(Adapter(model), self.limits.budget) if refits else None
        with self.streamed(self.model), self.streamed(model), torch.no_grad():
            ratios = self._ratios()
            maker = MaskedBlocks(self, Adapter(model), plain, in_place)
            maker.mask_all(ratios)
        check = self._check(model, dense, plain)
        if in_place:
            for new, old in zip(Adapter(model).blocks, self.adapter.blocks, strict=True):
                share_weights(new, old, tuple(new.names))
            model = self.model
        self.seconds["total"] = time.perf_counter() - start
        report = run_report(model, self.request.config, self._calibration, self.seconds, self.device)
        report |= mask_report(model, maker.masks) | {
            "score": self.request.name,
            "arm": self.request.arm,
            "ratio": self.request.ratio,
            "block_ratios": ratios,
            "held_out_nelbo": check,
            "factored": [asdict(each) for each in maker.factored],
            "unseen_experts": [{"block": index, "experts": each} for index, each in sorted(maker.unseen.items())],
            "refit": [fit.plain() for fit in maker.fits],
            "sinks": self.sink_report(self.log, self.calibration) if self._calibration else None,
        }
        return Masked(model, maker.masks, self._calibration, report)

    def _check(self, model: DiffusionLM, dense: Nelbo | None, plain: PlainWeights | None) -> dict | None:
        """What masks cost on held-out windows, if there are any; a refit without a gain there is undone."""
        if dense is None:
            return None
        after = before = self.kept_nelbo(f"masked-{self._digest}", lambda: model)
        refitted = None
        if plain is not None:
            refitted = after
            plain.swap()
            before = self.kept_nelbo(f"plain-{self._digest}", lambda: model)
            after = min(before, refitted, key=lambda nelbo: math.inf if math.isnan(nelbo.mean) else nelbo.mean)
            if after is refitted:
                plain.swap()
        return self.held_out(
            dense,
            after,
            kept="refit" if refitted is after else "plain masks",
            masked=after.mean,
            plain_masks=before.mean,
            refit=refitted.mean if refitted else None,
        )

    def _ratios(self) -> list[float]:
        """The removed ratio of every block; measures the dense model's norms where score or allocation needs them."""
        settings, request = self.request.settings, self.request
        if request.measures_dense:
            self._norms = self.timed("statistics", self._dense_norms)
        outliers = None
        if settings.allocation == "owl":
            # a block without weights is given the least share, which then counts for nothing
            blocks = {block.index: block for block in self.adapter.blocks if block.names}
            shares = {i: outlier_share(self._outlier_scores(b), settings.owl_threshold) for i, b in blocks.items()}
            outliers = [shares.get(block.index, min(shares.values())) for block in self.adapter.blocks]
        return block_ratios(settings, request.ratio, block_weights(self.adapter), outliers)

    def _dense_norms(self) -> dict[InputKey, torch.Tensor]:
        """Norms of the dense model's inputs (C,), or the journal's; the mass they were weighted by is observed."""
        if kept := self.part.read("norms"):
            observe_own(self.fit_scan(self.log), kept.tensors.get(MASS))
            return {(int(index), name): kept.tensors[f"{index} {name}"] for index, name in kept.notes["norms"]}
        settings, log = self.request.settings, SinkLog()
        scan, arm = self.fit_scan(log), self.request.arm or OUTLIER_ARM
        norms = one_shot_norms(scan, arm, settings.norms == "summed", settings.relative)
        mass = whole_mass(log.parts, self.workers)
        tensors = {f"{index} {name}": norm for (index, name), norm in norms.items()}
        self.part.keep("norms", tensors | mass, {"norms": list(norms)})
        observe_own(self.fit_scan(self.log), mass.get(MASS))
        return norms

    @property
    def part(self) -> Journal:
        """The journal of these masks."""
        return self.journal.within("masks", self._digest)

    @property
    def _digest(self) -> str:
        """Of all that decides the masks, beside what the journal's own identity fixes."""
        config = self.request.config.model_dump(mode="json", include={"method", "masking", "reconstruct"})
        return digest(config, str(self.request.arm))

    def _outlier_scores(self, block: BlockView) -> list[torch.Tensor]:
        norms = {role: self._norms[block.index, name] for name, roles in block.readers.items() for role in roles}
        return [wanda_scores(block[role].weight.to(norm.device), norm) for role, norm in norms.items()]

    def dense_norms(self, index: int) -> dict[str, torch.Tensor]:
        """Input -> norms (C,) of one block of the dense model; empty where they were not measured."""
        return {name: self._norms[index, name] for name in self.adapter.blocks[index].readers if self._norms}


def unshared(model: DiffusionLM) -> DiffusionLM:
    """A copy of a model whose projections can be replaced without changing it; tensors are shared until then."""
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    copy.source = getattr(model, "source", None)
    return copy.eval()
