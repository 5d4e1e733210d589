"""A whole structured run on one screen: calibration -> scores -> plan -> surgery -> refit -> check -> report."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from structprune.calibration.batches import Calibration
from structprune.calibration.build import CHECK_SEED, held_out_noise
from structprune.calibration.noise import level_times
from structprune.calibration.trajectories import calibrated, check_trajectory
from structprune.checkpoint.card import model_card
from structprune.checkpoint.export import check_export, check_export_request
from structprune.checkpoint.report import build_report
from structprune.checkpoint.save import save_pruned
from structprune.config import Config
from structprune.config.effects import check_structured
from structprune.errors import UserError
from structprune.evaluation.compare import paired_difference
from structprune.evaluation.nelbo import Nelbo, masked_nelbo
from structprune.models.adapter import CONSUMERS, Adapter
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import stream_target, streamed, synchronise
from structprune.refit.reconstruct import LayerFit, Reconstructor
from structprune.runs.mask import Masked, mask
from structprune.statistics.rows import Track, untracked
from structprune.statistics.sink_log import SinkLog
from structprune.structured.choose import check_choice, choose_counts, describe_counts, open_blocks
from structprune.structured.graph import coupled_units
from structprune.structured.plan import Plan, make_plan
from structprune.structured.scores.ranking import Limits, rank_units
from structprune.structured.scores.table import resolve_arm
from structprune.structured.surgery import apply_plan, pruned_config


@dataclass(frozen=True)
class Pruned:
    """What a run made.

    Attributes:
        model: the smaller model, in eval mode; shares its uncut tensors with the dense one.
        plan: what it keeps.
        calibration: what the run calibrated on.
        report: every figure of the run, as plain data.
    """

    model: DiffusionLM
    plan: Plan
    calibration: Calibration
    report: dict

    def save(self, directory: str | Path, overwrite: bool = False) -> Path:
        """Write model, tokenizer, plan.json, calibration.safetensors, report.json and model card, whole or not at all.

        Raises:
            UserError: as `structprune.checkpoint.save.save_pruned`.
        """
        export = self.report["config"]["export"]
        files = {
            "plan.json": self.plan.to_json(),
            "calibration.safetensors": self.calibration.save,
            "report.json": self.report,
            "README.md": model_card(self.report),
        }
        choices = {key: export[key] for key in ("compat", "dtype", "max_shard_size")}
        return save_pruned(self.model, directory, files=files, overwrite=overwrite, **choices)


def check_request(model: DiffusionLM, config: Config) -> None:
    """Raise what a run would fail on later, before any forward pass: choices that cannot be met or have no effect.

    Raises:
        UserError: the first that cannot be met.
    """
    settings = config.structured
    resolve_arm(settings.score, settings.arm)
    if stream_target(config.memory.offload, config.model.device) and settings.score == "taylor":
        raise UserError("score 'taylor' needs a backward pass, which memory.offload does not do: turn one of them off")
    check_choice(open_blocks(Adapter(model), settings), settings)
    check_structured(config)
    if config.calibration.held_out < 1 and not config.calibration.replays:
        raise UserError("calibration.held_out = 0 leaves nothing to choose split and damping on: set it to 1 or more")
    if not config.calibration.replays:
        level_times(config.calibration.steps, config.calibration.interval)
        check_trajectory(config)


def check_plan(model: DiffusionLM, plan: Plan, config: Config, source_values: dict) -> None:
    """Raise what a plan rules out: a model it does not fit, an export class it does not allow.

    Args:
        model: any with the dense shapes, on the meta device too.
        source_values: contents of the dense checkpoint's config.json.
    Raises:
        UserError: the first that does not go together.
    """
    plan.check(Adapter(model))
    small = pruned_config(model, plan, config.reconstruct.adds_bias)
    check_export(small, source_values, config.export.compat)


class Pruner:
    """Prunes one dense model on one calibration set, at as many ratios as asked for; what they share is done once.

    Args:
        model: from `structprune.load_model`; it is not changed.
        config: default `Config()`.
        calibration: default what `config` describes.
        track: wraps iterations that take long, `track(items, title)`.
    Raises:
        UserError: a request that cannot be met, in one line, before any forward pass.
    """

    def __init__(
        self,
        model: DiffusionLM,
        config: Config | None = None,
        calibration: Calibration | None = None,
        track: Track = untracked,
    ):
        self.model, self.config, self.track = model, config or Config(), track
        check_request(model, self.config)
        self._target = stream_target(self.config.memory.offload, self.config.model.device)
        self.calibration = calibrated(model, self.config, calibration, track)
        self.adapter = Adapter(model)
        memory = self.config.memory
        self.limits = Limits(self.config.calibration.batch, int(memory.budget_gb * 1e9), memory.overlap)
        self.seconds: dict[str, float] = {}
        self._check = held_out_noise(self.calibration, model, self.config.calibration.seed)
        self._paths: dict | None = None
        self._dense: Nelbo | None = None
        self._coupled: dict | None = None
        self._refits: dict[int, Reconstructor] = {}  # by the number of windows
        self._taken: dict | None = None  # by the sink policy

    @property
    def device(self) -> torch.device:
        """Where forward passes compute."""
        return self._target or self.model.device

    def _timed(self, name: str, work):
        synchronise(self.device)
        start = time.perf_counter()
        value = work()
        synchronise(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return value

    def _streamed(self, model: DiffusionLM):
        return streamed(model, self._target, self.config.memory.overlap)

    def _nelbo(self, model: DiffusionLM) -> Nelbo:
        batch = self.limits.sequences(self.calibration.levels, self.calibration.length)
        with self._streamed(model):
            return self._timed("check", lambda: masked_nelbo(model, *self._check, batch=batch))

    def _cut(self, plan: Plan) -> DiffusionLM:
        self._coupled = self._coupled or coupled_units(self.model)
        return apply_plan(self.model, plan, self.config.reconstruct.adds_bias, self._coupled)

    def _refit(self, plan: Plan, windows: int | None = None) -> tuple[DiffusionLM, list[LayerFit]]:
        """A cut and, where that is on, refitted model; on at most `windows` calibration windows."""
        small = self._cut(plan)
        if not self.config.reconstruct.enabled:
            return small, []
        calibration = self.calibration if windows is None else self.calibration.first(windows)
        if calibration.windows not in self._refits:
            # one that cannot hold its dense targets would cost memory and save nothing
            self._refits = {count: refit for count, refit in self._refits.items() if refit.kept}
            arguments = (calibration, self.config.reconstruct, self.config.sink, self.limits, self.track)
            log = SinkLog()
            with self._streamed(self.model):
                made = self._timed("refit", lambda: Reconstructor(self.model, *arguments, log.observe))
            self._refits[calibration.windows] = made
            self._note_sinks(log, calibration)
        refit = self._refits[calibration.windows]
        with self._streamed(self.model), self._streamed(small):
            return small, self._timed("refit", lambda: refit.refit(small))

    def _note_sinks(self, log: SinkLog, calibration: Calibration) -> None:
        """Keep what a log says, unless it is of fewer windows than what is known."""
        found = log.report(calibration.fit, self.config.sink, self.adapter.mask_id)
        if found is not None and found["windows"] >= (self._taken or found)["windows"]:
            self._taken = found

    def _at(self, ratio: float | None) -> Config:
        """The configuration at another ratio."""
        if ratio is None:
            return self.config
        return self.config.model_copy(update={"structured": self.config.structured.model_copy(update={"ratio": ratio})})

    def plan(self, ratio: float | None = None) -> tuple[Plan, dict]:
        """Score the units (once) and choose what goes at `ratio` (default: the configuration's).

        Returns:
            The plan, and how it was chosen as plain data.
        """
        config = self._at(ratio)
        settings = config.structured
        check_request(self.model, config)
        check_export_request(config)
        arm = resolve_arm(settings.score, settings.arm)
        sizes = open_blocks(self.adapter, settings)
        if self._paths is None:
            arguments = (self.adapter, self.calibration.fit, settings, arm, self.config.sink, self.limits, self.track)
            log = SinkLog()
            with self._streamed(self.model):
                self._paths = self._timed("scores", lambda: rank_units(*arguments, log.observe))
            self._note_sinks(log, self.calibration)
        notes = {"score": settings.score, "arm": arm, "allocation": settings.allocation, "ratio": settings.ratio}

        def plan_of(counts) -> Plan:
            return make_plan(self.adapter, self._paths, counts, settings.gqa, notes)

        def measure(counts) -> float:
            return self._nelbo(self._refit(plan_of(counts), settings.split_windows)[0]).mean

        choice = choose_counts(sizes, self._paths, settings, measure)
        chosen = {"split": choice.split, "measured": choice.measured, **describe_counts(sizes, choice.counts)}
        return plan_of(choice.counts), chosen

    def prune(self, ratio: float | None = None, plan: Plan | None = None) -> Pruned:
        """Plan (unless one is given), cut, refit, and check against plain removal on the held-out windows.

        Args:
            ratio: default the configuration's; not beside a plan.
            plan: apply this one instead of scoring.
        Raises:
            UserError: a ratio or export class that cannot be met, or a plan that does not fit the model.
        """
        if plan is not None and ratio is not None:
            raise UserError(f"a plan says what goes already: leave out ratio {ratio}")
        start, self.seconds = time.perf_counter(), {}
        chosen = None
        if plan is None:
            plan, chosen = self.plan(ratio)
        check_plan(self.model, plan, self.config, self.model.source.values)
        small, fits = self._refit(plan)
        if self._dense is None:
            self._dense = self._nelbo(self.model)
        refitted = self._nelbo(small)
        plain, kept_refit = refitted, False
        if fits:
            moved = consumer_parameters(small)
            small = None  # of two pruned models the second would be the peak of memory
            small = self._cut(plan)
            plain = self._nelbo(small)
            kept_refit = refitted.mean < plain.mean
            if kept_refit:
                for (index, role, name), value in moved.items():
                    setattr(Adapter(small).blocks[index][role], name, value)
        self.seconds["total"] = time.perf_counter() - start
        check = {
            "kept": "refit" if kept_refit else "plain removal",
            "dense": self._dense.mean,
            "plain_removal": plain.mean,
            "refit": refitted.mean if fits else None,
            "loss": paired_difference((refitted if kept_refit else plain).nelbo, self._dense.nelbo),
            "windows": self.calibration.held_out,
            "seed": CHECK_SEED + self.config.calibration.seed,
        }
        report = build_report(self.model, small, self._at(ratio), self.calibration, self.seconds, self.device)
        report |= {"held_out_nelbo": check, "refit": [fit.plain() for fit in fits], "choice": chosen}
        report["sinks"] = self._taken
        return Pruned(small, plan, self.calibration, report)


def consumer_parameters(model: DiffusionLM) -> dict[tuple[int, str, str], torch.nn.Parameter]:
    """(block index, role, name) -> what a refit moves."""
    blocks = Adapter(model).blocks
    return {(block.index, role, name): value
            for block in blocks for role in CONSUMERS for name, value in block[role].named_parameters()}  # fmt: skip


def prune(
    model: DiffusionLM,
    config: Config | None = None,
    calibration: Calibration | None = None,
    plan: Plan | None = None,
    track: Track = untracked,
) -> Pruned | Masked:
    """Prune a model once: score its units, plan, cut, refit, and check the result on held-out windows.

    Args:
        config: with method unstructured or nm, `structprune.runs.mask.mask` is what is run.
        plan: apply this one instead of scoring; it is still refitted and checked. The rest as in `Pruner`.
    Returns:
        What was made, with `model`, `report` and `save`.
    Raises:
        UserError: a request that cannot be met, in one line.
    """
    if config is not None and config.method != "structured":
        if plan is not None:
            raise UserError(f"a plan removes heads and channels: leave it out, or method = {config.method}")
        return mask(model, config, calibration, track)
    if plan is not None:
        check_plan(model, plan, config or Config(), model.source.values)
    return Pruner(model, config, calibration, track).prune(plan=plan)
