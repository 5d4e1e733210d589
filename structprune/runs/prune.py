"""A whole structured run on one screen: calibration -> scores -> plan -> surgery -> refit -> check -> report."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from structprune.calibration.batches import Calibration
from structprune.checkpoint.card import model_card
from structprune.checkpoint.output import Content
from structprune.checkpoint.report import run_report, structured_report
from structprune.checkpoint.save import save_pruned
from structprune.config import Config, ExportSettings
from structprune.errors import UserError
from structprune.evaluation.nelbo import Nelbo
from structprune.models.adapter import UnitKey
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track, untracked
from structprune.refit.products import LayerFit
from structprune.refit.reconstruct import Reconstructor, refitted_parameters
from structprune.runs.mask import Masked, mask
from structprune.runs.resolve import at_ratio, check_plan, resolve_structured
from structprune.runs.run import Run
from structprune.statistics.sink_log import SinkLog
from structprune.structured.choose import choose_counts
from structprune.structured.graph import Coupled, coupled_units
from structprune.structured.plan import Plan, make_plan
from structprune.structured.ranking import Paths, rank_units
from structprune.structured.request import StructuredRequest
from structprune.structured.surgery import apply_plan


@dataclass(frozen=True)
class Pruned:
    """The result of a run: the smaller model, in eval mode, which shares its uncut tensors with the dense one; the plan
    and calibration behind it; and every figure of the run as plain data."""

    model: DiffusionLM
    plan: Plan
    calibration: Calibration
    report: dict

    def save(self, directory: str | Path, overwrite: bool = False) -> Path:
        """Write model, tokenizer, plan.json, calibration.safetensors, report.json and model card, whole or not at all.

        Raises:
            UserError: as `structprune.checkpoint.save.save_pruned`.
        """
        export = ExportSettings(**self.report["config"]["export"])
        files: dict[str, Content] = {
            "plan.json": self.plan.to_json(),
            "calibration.safetensors": self.calibration.save,
            "report.json": self.report,
            "README.md": model_card(self.report),
        }
        return save_pruned(self.model, directory, export, files=files, overwrite=overwrite)


class Pruner(Run):
    """Prunes one dense model, which is not changed, at as many ratios as you like; shared work is done once.

    Args:
        config: default `Config()`; or a request that was resolved for a model of these shapes.
        calibration: default what `config` describes.
        track: wraps long iterations, `track(items, title)`.
    Raises:
        UserError: a request that cannot be met, before any forward pass.
    """

    def __init__(
        self,
        model: DiffusionLM,
        config: Config | StructuredRequest | None = None,
        calibration: Calibration | None = None,
        track: Track = untracked,
    ):
        if not isinstance(config, StructuredRequest):
            config = resolve_structured(config or Config(), model)
        self.request = config
        super().__init__(model, self.request, calibration, track)
        self._paths: Paths | None = None
        self._dense: Nelbo | None = None
        self._coupled: dict[UnitKey, Coupled] | None = None
        self._refits: dict[int, Reconstructor] = {}  # by the number of windows
        self._sinks: dict | None = None  # the sink policy's effect

    def _cut(self, plan: Plan) -> DiffusionLM:
        self._coupled = self._coupled or coupled_units(self.model)
        return apply_plan(self.model, plan, self.request.reconstruct.adds_bias, self._coupled)

    def _refit(self, plan: Plan, windows: int | None = None) -> tuple[DiffusionLM, list[LayerFit]]:
        """A cut and, where enabled, refitted model; on at most `windows` calibration windows."""
        small = self._cut(plan)
        if not self.request.reconstruct.enabled:
            return small, []
        calibration = self.calibration if windows is None else self.calibration.first(windows)
        refit = self._reconstructor(calibration)
        with self.streamed(self.model), self.streamed(small):
            return small, self.timed("refit", lambda: refit.refit(small, plan.remaining))

    def _reconstructor(self, calibration: Calibration) -> Reconstructor:
        """The refit on some windows, made once for each number of windows."""
        if calibration.windows not in self._refits:
            # one that cannot hold its dense targets takes memory and saves nothing
            self._refits = {count: refit for count, refit in self._refits.items() if refit.holds_targets}
            log = SinkLog()
            scan = replace(self.scan(log), calibration=calibration)
            with self.streamed(self.model):
                refit = self.timed("refit", lambda: Reconstructor(scan, self.request.reconstruct))
            self._refits[calibration.windows] = refit
            self._note_sinks(log, calibration)
        return self._refits[calibration.windows]

    def _note_sinks(self, log: SinkLog, calibration: Calibration) -> None:
        """Keep a log's report, unless an earlier one covers more windows."""
        report = log.report(calibration.fit, self.sink, self.adapter.mask_id)
        if report is not None and report["windows"] >= (self._sinks or report)["windows"]:
            self._sinks = report

    def plan(self, ratio: float | None = None) -> tuple[Plan, dict]:
        """Score the units (once) and choose which ones to remove at `ratio` (default: the configuration's).

        Returns:
            The plan, and how it was chosen as plain data.
        Raises:
            UserError: a ratio or export class that cannot be met.
        """
        request = at_ratio(self.request, ratio)
        settings = request.settings
        if self._paths is None:
            log = SinkLog()
            scan = self.fit_scan(log)
            with self.streamed(self.model):
                self._paths = self.timed("scores", lambda: rank_units(scan, settings, request.arm))
            self._note_sinks(log, self.calibration)
        paths = self._paths
        notes = {
            "score": settings.score, "arm": request.arm, "allocation": settings.allocation, "ratio": settings.ratio,
        }  # fmt: skip

        def plan_of(counts) -> Plan:
            return make_plan(self.adapter, paths, counts, settings.gqa, notes)

        def measure(counts) -> float:
            loss = self.nelbo(self._refit(plan_of(counts), settings.split_windows)[0]).mean
            return math.inf if math.isnan(loss) else loss  # the least of several is chosen

        choice = choose_counts(request.sizes, paths, settings, measure)
        return plan_of(choice.counts), choice.plain(request.sizes)

    def prune(self, ratio: float | None = None, plan: Plan | None = None) -> Pruned:
        """Plan, cut, refit, and check against plain removal on the held-out windows.

        Args:
            ratio: default the configuration's; not beside a plan.
            plan: apply this one instead of scoring.
        Raises:
            UserError: a ratio or export class that cannot be met, or a plan that does not fit the model.
        """
        if plan is not None and ratio is not None:
            raise UserError(f"a plan says what goes already: leave out ratio {ratio}")
        start, self.seconds = time.perf_counter(), {}
        request, choice = self.request, None
        if plan is None:
            request = at_ratio(self.request, ratio)
            plan, choice = self.plan(ratio)
        check_plan(self.request, self.model, plan, self.model.source.values)
        small, fits, check = self._refit_and_check(plan)
        self.seconds["total"] = time.perf_counter() - start
        report = run_report(self.model, request.config, self.calibration, self.seconds, self.device)
        report |= structured_report(self.model, small, request.config, self.calibration.length, plan.remaining)
        report |= {"held_out_nelbo": check, "refit": [fit.plain() for fit in fits], "choice": choice}
        report["sinks"] = self._sinks
        return Pruned(small, plan, self.calibration, report)

    def _refit_and_check(self, plan: Plan) -> tuple[DiffusionLM, list[LayerFit], dict]:
        """The better of refit and plain removal on the held-out windows, and how they compare."""
        small, fits = self._refit(plan)
        if self._dense is None:
            self._dense = self.nelbo(self.model)
        refitted = plain = self.nelbo(small)
        keeps_refit = False
        if fits:
            moved = refitted_parameters(small, self.request.reconstruct)
            del small  # two pruned models at once would be the peak of memory
            small = self._cut(plan)
            plain = self.nelbo(small)
            keeps_refit = refitted.mean < plain.mean
            if keeps_refit:
                for name, value in moved.items():
                    module, _, leaf = name.rpartition(".")
                    setattr(small.get_submodule(module), leaf, value)
        check = self.held_out(
            self._dense,
            refitted if keeps_refit else plain,
            kept="refit" if keeps_refit else "plain removal",
            plain_removal=plain.mean,
            refit=refitted.mean if fits else None,
        )
        return small, fits, check


def prune(
    model: DiffusionLM,
    config: Config | None = None,
    calibration: Calibration | None = None,
    plan: Plan | None = None,
    track: Track = untracked,
) -> Pruned | Masked:
    """Prune a model once: score its units, plan, cut, refit, and check the result on held-out windows.

    Args:
        config: with method unstructured or nm, `structprune.runs.mask.mask` does the run.
        plan: apply this one instead of scoring; it is still refitted and checked.
        calibration, track: as in `Pruner`.
    Returns:
        The result, with `model`, `report` and `save`.
    Raises:
        UserError: a request that cannot be met, in one line.
    """
    config = config or Config()
    if config.method != "structured":
        if plan is not None:
            raise UserError(f"a plan removes heads and channels: leave it out, or method = {config.method}")
        return mask(model, config, calibration, track)
    request = resolve_structured(config, model)
    if plan is not None:
        check_plan(request, model, plan, model.source.values)
    return Pruner(model, request, calibration, track).prune(plan=plan)
