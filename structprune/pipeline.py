"""A whole structured run on one screen: calibration -> scores -> plan -> surgery -> refit -> check -> report."""

import platform
import time
from dataclasses import asdict, dataclass, replace

import torch

from structprune.calibration.batches import Calibration
from structprune.calibration.build import load_calibration
from structprune.calibration.noise import stratified_noise
from structprune.checkpoint.export import check_export, export_class
from structprune.config import Config
from structprune.criteria.ranking import Limits, rank_units
from structprune.criteria.table import resolve_arm
from structprune.errors import UserError
from structprune.evaluation.compare import paired_difference
from structprune.evaluation.nelbo import Nelbo, masked_nelbo
from structprune.models.adapter import Adapter
from structprune.models.loading import load_tokenizer
from structprune.models.modeling_structprune import DiffusionLM
from structprune.statistics.rows import Track, untracked
from structprune.structured.allocate import check_ratio, most_ratio
from structprune.structured.choose import (
    Choice,
    candidates,
    channel_multiple,
    check_split,
    choose_counts,
    describe_counts,
    open_blocks,
)
from structprune.structured.plan import Plan, make_plan
from structprune.structured.reconstruct import LayerFit, Reconstructor
from structprune.structured.sizes import block_size, forward_macs
from structprune.structured.surgery import apply_plan

CHECK_SEED = 977  # of the noise of the held-out check, which is not the calibration's


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


def calibrate(model: DiffusionLM, config: Config) -> Calibration:
    """The calibration set that `config` describes, tokenised by the model's own checkpoint.

    Raises:
        UserError: text or file that cannot be used.
    """
    adapter = Adapter(model)
    replayed = config.calibration.source.endswith(".safetensors")
    longest = getattr(model.config, adapter.family.keys["positions"])
    if not replayed and config.calibration.length > longest:
        raise UserError(f"calibration.length = {config.calibration.length} exceeds the model's {longest} positions: lower it")
    return load_calibration(
        config.calibration,
        None if replayed else load_tokenizer(model.source.directory),
        mask_id=adapter.mask_id,
        schedule=adapter.family.schedule,
        edges_visible=model.edges_visible,
        vocabulary=adapter.vocabulary,
    )


def check_request(model: DiffusionLM, config: Config) -> None:
    """Raise what a run would fail on later: ratio, arm, split and rounding, before any forward pass.

    Raises:
        UserError: the first that cannot be met.
    """
    settings = config.structured
    check_ratio(settings.ratio)
    resolve_arm(settings.score, settings.arm)
    if settings.relative is not None and settings.score != "obs":
        raise UserError(f"structured.relative is for score obs, not {settings.score}: leave it unset")
    sizes = open_blocks(Adapter(model), settings)
    check_split(settings)
    if settings.allocation == "global":
        most = most_ratio(sizes, channel_multiple(sizes, settings))
        if settings.ratio > most:
            raise UserError(f"no plan meets ratio {settings.ratio}: the most is {most:.4f}")
    else:
        candidates(sizes, settings)


class _Run:
    """The state of one run: the dense model, its held-out check, and a refit that is set up once."""

    def __init__(self, model: DiffusionLM, config: Config, calibration: Calibration, track: Track):
        self.model, self.config, self.calibration, self.track = model, config, calibration, track
        self.adapter = Adapter(model)
        self.limits = Limits(config.calibration.batch, int(config.memory.budget_gb * 1e9))
        self.seconds: dict[str, float] = {}
        held_out = calibration.check.input_ids  # (n, T)
        generator = torch.Generator().manual_seed(CHECK_SEED + config.calibration.seed)
        noise = stratified_noise(held_out, self.adapter.mask_id, generator, calibration.levels, model.edges_visible)
        self._check = (held_out, *noise)
        self._reconstructor: Reconstructor | None = None

    def timed(self, name: str, work):
        start = time.perf_counter()
        value = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return value

    def nelbo(self, model: DiffusionLM) -> Nelbo:
        batch = self.config.calibration.batch * self.calibration.levels
        return self.timed("check", lambda: masked_nelbo(model, *self._check, batch=batch))

    def cut(self, plan: Plan) -> DiffusionLM:
        bias = self.config.reconstruct.constant or self.config.reconstruct.mode == "bias"
        return apply_plan(self.model, plan, output_bias=self.config.reconstruct.enabled and bias)

    def refit(self, plan: Plan, windows: int | None = None) -> tuple[DiffusionLM, list[LayerFit]]:
        """A cut and, where that is on, refitted model; on at most `windows` calibration windows."""
        small = self.cut(plan)
        if not self.config.reconstruct.enabled:
            return small, []
        calibration = self.calibration if windows is None else self.calibration.first(windows)
        if self._reconstructor is None or self._reconstructor.windows != calibration.windows:
            self._reconstructor = None  # its dense activations go before the next one's come
            arguments = (calibration, self.config.reconstruct, self.config.sink, self.limits, self.track)
            self._reconstructor = self.timed("refit", lambda: Reconstructor(self.model, *arguments))
        return small, self.timed("refit", lambda: self._reconstructor.refit(small, plan))

    def choose(self) -> tuple[Plan, Choice, dict]:
        """Scores, then the plan."""
        settings = self.config.structured
        arm = resolve_arm(settings.score, settings.arm)
        sizes = open_blocks(self.adapter, settings)
        arguments = (self.adapter, self.calibration.fit, settings, arm, self.config.sink, self.limits, self.track)
        paths = self.timed("scores", lambda: rank_units(*arguments))
        notes = {"score": settings.score, "arm": arm, "allocation": settings.allocation, "asked_ratio": settings.ratio}

        def plan_of(counts) -> Plan:
            return make_plan(self.adapter, paths, counts, settings.gqa, notes)

        def measure(counts) -> float:
            return self.nelbo(self.refit(plan_of(counts), settings.split_windows)[0]).mean

        choice = choose_counts(sizes, paths, settings, measure)
        return plan_of(choice.counts), choice, describe_counts(sizes, choice.counts)


def prune(
    model: DiffusionLM,
    config: Config | None = None,
    calibration: Calibration | None = None,
    plan: Plan | None = None,
    track: Track = untracked,
) -> Pruned:
    """Prune a model: score its units, plan, cut, refit, and check the result on held-out windows.

    Args:
        model: from `structprune.load_model`; it is not changed.
        config: default `Config()`.
        calibration: default `calibrate(model, config)`.
        plan: apply this one instead of scoring; it is still refitted and checked.
        track: wraps iterations that take long, `track(items, title)`.
    Returns:
        `Pruned`.
    Raises:
        UserError: a request that cannot be met, in one line.
    """
    config = config or Config()
    if plan is None:
        check_request(model, config)
    else:
        plan.check(Adapter(model))
    calibration = calibration or calibrate(model, config)
    run = _Run(model, config, calibration, track)
    start = time.perf_counter()
    choice, counts = None, None
    if plan is None:
        plan, choice, counts = run.choose()
    small, fits = run.refit(plan)
    check_export(small.config, model.source.values, config.export.compat)
    dense, refitted = run.nelbo(model), run.nelbo(small)
    plain_model = run.cut(plan) if fits else small
    plain = run.nelbo(plain_model) if fits else refitted
    kept_refit = bool(fits) and refitted.mean < plain.mean
    if fits and not kept_refit:
        small = plain_model
    run.seconds["total"] = time.perf_counter() - start
    outcome = {
        "kept": "refit" if kept_refit else "plain removal",
        "dense": dense.mean,
        "plain_removal": plain.mean,
        "refit": refitted.mean if fits else None,
        "loss": paired_difference((refitted if kept_refit else plain).nelbo, dense.nelbo),
        "windows": calibration.held_out,
    }
    report = build_report(model, small, config, run, plan) | {
        "held_out_nelbo": outcome,
        "refit": [asdict(fit) for fit in fits],
        "choice": None if choice is None else {"split": choice.split, "measured": choice.measured, **counts},
    }
    plan = replace(plan, notes=plan.notes | {"ratio": report["ratio"]})
    return Pruned(small, plan, calibration, report)


def build_report(model: DiffusionLM, small: DiffusionLM, config: Config, run: _Run, plan: Plan) -> dict:
    """Figures that hold for any pruned model: sizes, versions, seeds, timings, peak memory, export class."""
    import transformers

    import structprune
    from structprune.bench.memory import peak_memory_bytes

    before, after = Adapter(model), Adapter(small)
    prunable = [sum(p.numel() for block in side.blocks for p in block.module.parameters()) for side in (before, after)]
    length = run.calibration.length
    return {
        "source": str(model.source.values.get("_name_or_path") or model.source.directory.name),
        "family": before.family.name,
        "config": config.model_dump(mode="json"),
        "ratio": removed_ratio(before, after, config),
        "parameters": {"before": model.num_parameters(), "after": small.num_parameters()},
        "block_parameters": {"before": prunable[0], "after": prunable[1]},
        "macs": {"before": forward_macs(before, length), "after": forward_macs(after, length), "tokens": length},
        "widths": [asdict(block.widths) for block in after.blocks],
        "export_class": export_class(small.config, model.source.values),
        "calibration": run.calibration.metadata | {"windows": run.calibration.windows, "length": length},
        "seconds": {name: round(value, 3) for name, value in run.seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": {
            "structprune": structprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def removed_ratio(before: Adapter, after: Adapter, config: Config) -> float:
    """Removed share of the seven projections' parameters over unprotected blocks (added biases not counted)."""
    first, last = config.structured.protect_first, len(before.blocks) - config.structured.protect_last

    def count(side: Adapter) -> int:
        return sum(sizes.total for sizes in (block_size(block, "query_heads") for block in side.blocks[first:last]))

    return 1 - count(after) / count(before)
