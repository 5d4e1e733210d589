"""A whole structured run on one screen: calibration -> scores -> plan -> surgery -> refit -> check -> report."""

import math
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from structprune.calibration.batches import Calibration
from structprune.config import Config
from structprune.errors import UserError
from structprune.evaluation.nelbo import Nelbo
from structprune.levels.latency import LatencyTarget
from structprune.models.adapter import UnitKey
from structprune.models.journal import NOWHERE
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track, untracked
from structprune.refit.products import LayerFit
from structprune.refit.reconstruct import Reconstructor, finished
from structprune.runs.budget import within_memory
from structprune.runs.depth import DropResult, check_levels_use, search_drops
from structprune.runs.latency import choose_for_latency, latency_report, latency_target
from structprune.runs.parts import levels_part, plan_digest, refit_part, scores_part
from structprune.runs.pruned import Candidate, Pruned, pruned_report
from structprune.runs.resolve import at_ratio, check_given_plan, check_plan, resolve_structured
from structprune.runs.run import Run
from structprune.runs.search import (
    SearchContext,
    SearchResult,
    check_levels,
    held_out_divergences,
    levels_directory,
    search_widths,
)
from structprune.statistics.sink_log import SinkLog, WidestReport
from structprune.structured.allocate import Counts
from structprune.structured.choose import Choice, choose_counts
from structprune.structured.graph import Coupled, coupled_units
from structprune.structured.plan import Plan, identity_plan, make_plan
from structprune.structured.ranking import Paths, rank_units
from structprune.structured.request import StructuredRequest
from structprune.structured.surgery import apply_plan
from structprune.workers import ALONE, Workers


class Pruner(Run):
    """Prunes one dense model, which is not changed, at as many ratios as you like; shared work is done once.

    Args:
        config: default `Config()`; or a request that was resolved for a model of these shapes.
        calibration: default what `config` describes.
        track: wraps long iterations, `track(items, title)`.
        levels: directory for the levels of a search, which stay there; None: a temporary one.
        workers: the processes that share the windows, with the same arguments each.
    Raises:
        UserError: a request that cannot be met, before any forward pass.
    """

    def __init__(
        self,
        model: DiffusionLM,
        config: Config | StructuredRequest | None = None,
        calibration: Calibration | None = None,
        track: Track = untracked,
        levels: Path | None = None,
        workers: Workers = ALONE,
    ):
        if not isinstance(config, StructuredRequest):
            config = within_memory(resolve_structured(config or Config(), model, calibration=calibration), model)
        super().__init__(model, config, calibration, track, workers)
        self.request, self._levels = config, levels
        if levels is not None:
            check_levels_use(self.request.config, levels)
            if not self.generates:
                check_levels(levels, model, self.calibration, self.request)
        self._paths: Paths | None = None
        self._latency: LatencyTarget | None = None  # with a table, once that is measured
        self._dense: Nelbo | None = None
        self._coupled: dict[UnitKey, Coupled] | None = None
        self._refits: dict[int, Reconstructor] = {}  # by the number of windows
        self._sinks = WidestReport()  # the sink policy's effect
        self._refit_sinks: dict[int, dict | None] = {}  # the same, on the windows of each refit

    def _cut(self, plan: Plan) -> DiffusionLM:
        self._coupled = self._coupled or coupled_units(self.model)
        return apply_plan(self.model, plan, self.request.reconstruct.adds_bias, self._coupled)

    def _refit(self, plan: Plan, windows: int | None = None) -> tuple[DiffusionLM, list[LayerFit]]:
        """A cut and, where enabled, refitted model.

        Args:
            windows: of a candidate, whose consumers are refitted on at most so many: enough to compare candidates.
        """
        small, settings = self._cut(plan), self.request.reconstruct
        if not settings.enabled:
            return small, []
        # of a candidate, the loss is kept
        journal = refit_part(self.journal, plan, settings) if windows is None else NOWHERE
        if not settings.head and (fits := finished(self.adapter, small, plan.remaining, journal)) is not None:
            if sinks := journal.read("sinks"):
                self._sinks.note(sinks.notes)
            return small, fits
        calibration = self.calibration if windows is None else self.calibration.first(windows)
        refit = self._reconstructor(calibration)
        if not journal.has("sinks"):
            journal.keep("sinks", notes=self._refit_sinks[calibration.windows])
        work = partial(refit.refit, small, plan.remaining, windows is None, journal, plan.experts)
        with self.streamed(self.model), self.streamed(small):
            return small, self.timed("refit", work)

    def _reconstructor(self, calibration: Calibration) -> Reconstructor:
        """The refit on some windows, made once for each number of windows."""
        if calibration.windows not in self._refits:
            # one that cannot hold its dense targets takes memory and saves nothing
            self._refits = {count: refit for count, refit in self._refits.items() if refit.holds_targets}
            log = SinkLog()
            scan = replace(self.scan(log), calibration=calibration.share(self.workers))
            with self.streamed(self.model):
                refit = self.timed("refit", lambda: Reconstructor(scan, self.request.reconstruct))
            self._refits[calibration.windows] = refit
            self._refit_sinks[calibration.windows] = self.sink_report(log, calibration)
        self._sinks.note(self._refit_sinks[calibration.windows])
        return self._refits[calibration.windows]

    def plan(self, ratio: float | None = None) -> tuple[Plan, dict]:
        """The plan at `ratio` (default: the configuration's), before any search, and how it was chosen, as plain data.

        Units are scored once. With search.budget = latency, times are measured first, and decide the ratio.

        Raises:
            UserError: a ratio or export class that cannot be met.
        """
        request, choice = self._planned(ratio)
        return self._plan_of(request, choice.counts), choice.plain(request.sizes)

    def _planned(self, ratio: float | None) -> tuple[StructuredRequest, Choice]:
        """The request at a ratio, by default its own or what its latency takes, and the ranking's choice there."""
        request = at_ratio(self.request, ratio)
        if request.config.search.budget != "latency":
            return request, self._choose(request)
        if self._latency is None:
            levels = self._levels or levels_part(self.journal, self.request, [ratio])
            work = partial(latency_target, self.model, request, self.calibration.length, levels, self.track)
            self._latency = self.timed("latency", lambda: self.workers.from_first(work))
        return choose_for_latency(self._latency, request, self._ranked(request), self._choose)

    def _choose(self, request: StructuredRequest) -> Choice:
        paths = self._ranked(request)

        def measure(counts: Counts) -> float:
            decisive = (self._plan_of(request, counts), request.reconstruct, request.settings.split_windows)
            loss = self.kept_nelbo(f"candidate-{plan_digest(*decisive)}", lambda: self._tried(request, counts)).mean
            return math.inf if math.isnan(loss) else loss  # the least of several is chosen

        return choose_counts(request.sizes, paths, request.settings, measure)

    def _tried(self, request: StructuredRequest, counts: Counts) -> DiffusionLM:
        """What a candidate's counts leave, refitted on fewer windows."""
        return self._refit(self._plan_of(request, counts), request.settings.split_windows)[0]

    def _ranked(self, request: StructuredRequest) -> Paths:
        """The order in which units go, by the configured score; measured once."""
        if self._paths is None:
            self.generate()
            log, part = SinkLog(), scores_part(self.journal, self.request)
            with self.streamed(self.model):
                work = partial(rank_units, self.fit_scan(log), request.settings, request.arm, part)
                self._paths = self.timed("scores", work)
            self._sinks.note(self.sink_report(log, self.calibration))
        return self._paths

    def _plan_of(self, request: StructuredRequest, counts: Counts, paths: Paths | None = None) -> Plan:
        """The plan that removes `counts` steps of `paths`, by default those of the score."""
        settings = request.settings
        notes = {"score": settings.score, "arm": request.arm} | settings.model_dump(include={"allocation", "ratio"})
        return make_plan(self.adapter, paths or self._ranked(request), counts, settings.gqa, notes)

    def _search_context(self, request: StructuredRequest) -> SearchContext:
        return SearchContext(
            self.model, request, self.calibration, self._reconstructor(self.calibration),
            lambda: self._cut(identity_plan(self.adapter)), self._ranked(request), self.streamed, self.track,
            self.timed, self._latency, self.workers, self.journal,
        )  # fmt: skip

    def prune(self, ratio: float | None = None, plan: Plan | None = None) -> Pruned:
        """Plan, cut, refit, and check against plain removal on the held-out windows.

        Args:
            ratio: default the configuration's; not beside a plan or a latency. plan: apply this one, without scores.
        Raises:
            UserError: a ratio or export class that cannot be met, or a plan that does not fit the model.
        """
        if plan is not None:
            if ratio is not None:
                raise UserError(f"a plan says what goes already: leave out ratio {ratio}")
            check_given_plan(self.request, self.model, plan, self.model.source.values)
            start = self.begin()
            return self._pruned(self.request, self._refit_and_check(plan), start)
        [pruned] = self.prune_each([ratio])
        return pruned

    def prune_each(self, ratios: Sequence[float | None], written: Container[float | None] = ()) -> Iterator[Pruned]:
        """As `prune`, at one ratio after another in rising order; None is the configuration's.

        Scores, the refit's dense side and a search's first levels are shared, and their seconds are the first result's.

        Args:
            written: ratios that are only planned, as the first levels of a search are made around all plans.
        Raises:
            UserError: a ratio, export class or levels that will not do, when the first result is asked for.
        """
        start = self.begin()
        for ratio in ratios:
            request = at_ratio(self.request, ratio)
            if self._levels is not None:
                check_levels(self._levels, self.model, self.calibration, request)
        planned = sorted(map(self._planned, ratios), key=lambda each: each[0].settings.ratio)
        plans = [self._checked(self._plan_of(request, choice.counts)) for request, choice in planned]
        with levels_directory(self._levels or levels_part(self.journal, self.request, ratios), self.workers) as levels:
            shared = (levels, [choice.counts for request, choice in planned if request.settings.ratio > 0])
            for (request, choice), plan in zip(planned, plans):
                if request.settings.ratio in written:
                    continue
                result, search = self._refit_and_check(plan), None
                if request.config.search.enabled and request.settings.ratio > 0:
                    result, choice, search = self._searched(request, choice, result, shared)
                yield self._pruned(request, result, start, choice, search)
                del result  # two pruned models at once would be the peak of memory
                start = self.begin()

    def _checked(self, plan: Plan) -> Plan:
        check_plan(self.request, self.model, plan, self.model.source.values)
        return plan

    def _pruned(
        self, request: StructuredRequest, result: Candidate, start: float,
        choice: Choice | None = None, search: dict | None = None,
    ) -> Pruned:  # fmt: skip
        """The result of a run that began at `start`, in seconds of the clock."""
        latency = None
        if choice is not None and (target := self._latency) is not None:
            work = partial(latency_report, target, self.model, result.model, choice.counts)
            latency = self.timed("latency", lambda: self.workers.from_first(work)) | {"ratio": request.settings.ratio}
            request = self.request  # whose configuration can be given again
        self.seconds["total"] = time.perf_counter() - start
        notes = {"choice": choice and choice.plain(request.sizes), "search": search, "sinks": self._sinks.report}
        report = pruned_report(self, request, result) | notes | {"latency": latency}
        return Pruned(result.model, result.plan, self.calibration, report)

    def _searched(
        self, request: StructuredRequest, choice: Choice, ranked: Candidate, shared: tuple[Path, list[Counts]]
    ) -> tuple[Candidate, Choice, dict]:
        """The better of the ranked plan and of one that is searched for, and the search as plain data.

        Their divergence from the dense model decides, on the held-out windows under the noise of the check, which the
        search did not see: it varies less over windows than the difference of their NELBOs.

        Args:
            shared: the directory of levels, and the counts of all ratios.
        """
        context = self._search_context(request)
        search = self.timed("search", lambda: self._search(context, choice, shared))
        searched = self._refit_and_check(self._checked(self._plan_of(request, search.counts, search.paths)))
        pair = {"ranked": ranked, "searched": searched}
        work = partial(held_out_divergences, self.model, [each.model for each in pair.values()], context)
        with self.streamed(self.model), self.streamed(ranked.model), self.streamed(searched.model):
            divergence = dict(zip(pair, self.timed("check", work)))
        kept = min(pair, key=divergence.__getitem__)
        loss = {name: each.loss for name, each in pair.items()}
        notes = search.plain() | {"kept": kept, "divergence": divergence, "loss": loss}
        counts = search.counts if kept == "searched" else choice.counts
        return pair[kept], replace(choice, counts=counts), notes

    def _search(
        self, context: SearchContext, choice: Choice, shared: tuple[Path, list[Counts]]
    ) -> SearchResult | DropResult:
        """A search for widths, or under an export class of equal blocks one for whole blocks to drop."""
        request = context.request
        if request.config.drops_blocks:
            cut, refit = (lambda counts: self._cut(self._plan_of(request, counts))), partial(self._tried, request)
            return search_drops(context, choice, cut, refit)
        with self.streamed(self.model):
            return search_widths(context, choice.counts, *shared)

    def _refit_and_check(self, plan: Plan) -> Candidate:
        """The better of refit and plain removal on the held-out windows, and how they compare."""
        if self._dense is None:
            self._dense = self.kept_nelbo("dense", lambda: self.model)
        name = plan_digest(plan, self.request.reconstruct)
        # before the refit: two pruned models at once would be the peak of memory
        plain = self.kept_nelbo(f"plain-{name}", lambda: self._cut(plan))
        small, fits = self._refit(plan)
        refitted = self.kept_nelbo(f"refitted-{name}", lambda: small) if fits else plain
        kept, loss = ("refit", refitted) if refitted.mean < plain.mean else ("plain removal", plain)
        if fits and loss is plain:
            del small
            small = self._cut(plan)
        means = {"plain_removal": plain.mean, "refit": refitted.mean if fits else None}
        return Candidate(plan, small, fits, self.held_out(self._dense, loss, kept, **means))
