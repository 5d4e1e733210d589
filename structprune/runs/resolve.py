"""From a configuration and a model's shapes to a request: what contradicts itself or cannot be met is refused here.

The dry run and the run share it. The model may be on the meta device.
"""

from dataclasses import replace

from structprune.calibration.batches import Calibration, saved_sizes
from structprune.calibration.noise import check_copies, level_times
from structprune.calibration.trajectories import check_trajectory
from structprune.checkpoint.export import check_export, check_export_request
from structprune.config import Config
from structprune.config.effects import CAUSAL, Facts, check_masking, check_search, check_structured
from structprune.config.sections import within_positions
from structprune.errors import UserError
from structprune.generation.samplers import check_states
from structprune.masking.allocate import block_ratios
from structprune.masking.patterns import check_pattern, parse_nm
from structprune.masking.request import MaskRequest
from structprune.masking.scores.table import SCORES as MASK_SCORES
from structprune.masking.scores.table import resolve_score
from structprune.models.adapter import Adapter
from structprune.models.encode import causal_weight
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.resources import resolve_resources
from structprune.runs.export_widths import check_export_widths
from structprune.structured.choose import check_choice, open_blocks
from structprune.structured.depth import check_dropped
from structprune.structured.plan import Plan
from structprune.structured.request import StructuredRequest
from structprune.structured.scores.table import SCORES, resolve_arm
from structprune.structured.surgery import pruned_config


def resolve_structured(
    config: Config, model: DiffusionLM, dry_run: bool = False, calibration: Calibration | None = None
) -> StructuredRequest:
    """A structured run, before any forward pass.

    Args:
        dry_run: the device need not be on this machine.
        calibration: that the run is given, in place of what `config` describes.
    Raises:
        UserError: the first choice that cannot be met or has no effect.
    """
    settings = config.structured
    arm = resolve_arm(settings.score, settings.arm)
    resources = resolve_resources(config.model, config.memory, dry_run)
    if resources.offload and (learner := backward_user(config)):
        raise UserError(f"{learner} needs a backward pass, which memory.offload does not do: turn one of them off")
    if resources.on_disk and config.search.enabled:
        raise UserError("search.enabled = true holds levels in memory, which memory.offload = disk is to save: use one")
    check_mixtures(Adapter(model), config)
    sizes = open_blocks(Adapter(model), settings)
    by_latency = config.search.budget == "latency"  # the run finds the ratio
    check_choice(sizes, settings.model_copy(update={"ratio": 0.0}) if by_latency else settings)
    check_search(config)
    check_structured(config, Facts(settings.score, arm, SCORES, resources.accelerator))
    config = with_causal(with_length(config, model), model)
    if config.calibration.held_out < 1 and not config.calibration.replays:
        raise UserError("calibration.held_out = 0 leaves nothing to choose split and damping on: set it to 1 or more")
    check_levels(config, model)
    check_latency_length(config, model)
    if config.reconstruct.enabled and config.reconstruct.head and model.followers:
        reason = "the head follows the embedding, which a refit of the head would change"
        raise UserError(f"reconstruct.head = true is not possible for this model: {reason}: set it to false")
    return StructuredRequest(
        config=config, arm=arm, resources=resources, score=SCORES[settings.score], sizes=sizes,
        dense=model.config, saved=sizes_of_saved(config, calibration),
    )  # fmt: skip


def check_mixtures(adapter: Adapter, config: Config) -> None:
    """Raise UserError for what cannot be done with mixtures of experts: a search, and weights by gradients."""
    if not any(block.mixture for block in adapter.blocks):
        return
    if config.search.enabled:
        raise UserError(f"search.enabled = true does not know the experts of {adapter.family.name}: leave it out")
    if config.reconstruct.adds_bias:
        raise UserError("reconstruct.constant = true and mode = bias need biases, which experts lack: leave them out")
    if config.reconstruct.enabled and config.reconstruct.weighting == "gradient":
        raise UserError("reconstruct.weighting = gradient does not know experts: use uniform, noise or certainty")


def with_length(config: Config, model: DiffusionLM) -> Config:
    """The configuration with calibration windows that the model takes, where it names no length."""
    calibration = within_positions(config.calibration, Adapter(model).positions)
    return config.model_copy(update={"calibration": calibration})


def with_causal(config: Config, model: DiffusionLM) -> Config:
    """The configuration with the weight of causal reading that the model's config has, where it names none.

    Raises:
        UserError: it names one, and the model is not causal too.
    """
    given = config.calibration.causal
    if not model.layout.causal:
        if given is not None:
            raise UserError(f"calibration.causal = {given:g} has no effect without {CAUSAL}: leave it out")
        return config
    if given is None:
        given = causal_weight(model)
    return config.model_copy(update={"calibration": config.calibration.model_copy(update={"causal": given})})


def backward_user(config: Config) -> str | None:
    """What of a structured run needs gradients."""
    if SCORES[config.structured.score].needs == "gradients":
        return f"score '{config.structured.score}'"
    weighs = config.reconstruct.enabled and config.reconstruct.weighting == "gradient"
    return "reconstruct.weighting = gradient" if weighs else None


def at_ratio(request: StructuredRequest, ratio: float | None, cut_before: bool = False) -> StructuredRequest:
    """The request at another removed ratio (None: its own), without a plan to apply.

    Args:
        cut_before: the run will get a smaller model than the one of the request, of widths that are not known yet.
    Raises:
        UserError: no plan meets the ratio, the export class rules it out, or it leaves a search nothing to compare.
    """
    if ratio is not None:
        if request.config.search.budget == "latency":
            raise UserError(f"search.budget = latency decides how much goes: leave out ratio {ratio}")
        request = with_ratio(request, ratio)
        check_choice(request.sizes, request.settings)
    check_export_request(request.config, request.reads_head_dim)
    if not cut_before:
        check_export_widths(request)
    if request.config.drops_blocks and request.settings.ratio > 0:
        check_dropped(request.sizes, request.settings)
    return request


def with_ratio(request: StructuredRequest, ratio: float) -> StructuredRequest:
    """The request with another removed ratio, unchecked."""
    settings = request.settings.model_copy(update={"ratio": ratio})
    return replace(request, config=request.config.model_copy(update={"structured": settings}))


def check_given_plan(request: StructuredRequest, model: DiffusionLM, plan: Plan, source_values: dict) -> None:
    """As `check_plan`, for a plan of the user's, beside which nothing is searched for."""
    if request.config.search.enabled:
        raise UserError("search.enabled = true has no effect on a given plan: leave one of them out")
    check_plan(request, model, plan, source_values)


def check_plan(request: StructuredRequest, model: DiffusionLM, plan: Plan, source_values: dict) -> None:
    """Raise UserError unless a plan fits the model and the export class; `source_values` of the dense config.json."""
    plan.check(Adapter(model))
    check_export(pruned_config(model, plan, request.reconstruct.adds_bias), source_values, request.config.export.compat)


def resolve_masking(
    config: Config, model: DiffusionLM, dry_run: bool = False, calibration: Calibration | None = None
) -> MaskRequest:
    """An unstructured or N:M run, before any forward pass; arguments as `resolve_structured`.

    Raises:
        UserError: the first choice that cannot be met or has no effect.
    """
    masking, adapter = config.masking, Adapter(model)
    if config.method == "structured":
        raise UserError("method = structured makes no masks: set it to unstructured or nm")
    name, arm = resolve_score(masking.score, masking.arm)
    score = MASK_SCORES[name]
    reads = arm is not None or masking.allocation == "owl" or config.reconstruct.enabled
    reads |= config.calibration.held_out > 0
    resources = resolve_resources(config.model, config.memory, dry_run)
    check_masking(config, Facts(name, arm, MASK_SCORES, resources.accelerator, reads))
    ratio = removed_ratio(config)
    nm = parse_nm(masking.nm) if config.method == "nm" else None
    if nm is not None:
        check_pattern(adapter.blocks, masking.nm)
        if masking.allocation != "uniform":
            choice = f"masking.allocation = {masking.allocation}"
            raise UserError(f"{choice} varies the ratio over blocks, which N:M fixes at {ratio:g}: use uniform")
    if masking.allocation != "owl":  # which activations decide
        block_ratios(masking, ratio, block_weights(adapter), None)
    if config.reconstruct.enabled and config.calibration.held_out < 1 and not config.calibration.replays:
        raise UserError(
            "calibration.held_out = 0 leaves nothing to choose the refit's damping on: set it, or"
            " reconstruct.enabled = false"
        )
    if reads:
        config = with_causal(with_length(config, model), model)
        check_levels(config, model)
    return MaskRequest(
        config=config, arm=arm, resources=resources, reads_text=reads, name=name, score=score, ratio=ratio, nm=nm,
        saved=sizes_of_saved(config, calibration) if reads else None,
    )  # fmt: skip


def sizes_of_saved(config: Config, calibration: Calibration | None) -> dict[str, int] | None:
    """`Calibration.sizes` of one that is given, or saved in the file that the configuration names; None for text.

    Raises:
        UserError: the file cannot be read.
    """
    if calibration is not None:
        return calibration.sizes
    settings = config.calibration
    return saved_sizes(settings.source, settings.held_out) if settings.replays else None


def check_levels(config: Config, model: DiffusionLM) -> None:
    """Raise UserError for noise levels or trajectories that the settings rule out, or that the model does not have."""
    if config.sink.trajectory == "reverse":
        check_states(model.config, "sink.trajectory = reverse")
    settings = config.calibration
    if not settings.replays:
        level_times(settings.steps, settings.interval)
        check_copies(settings.copies, settings.levels)
        check_trajectory(config)


def check_latency_length(config: Config, model: DiffusionLM) -> None:
    """Raise UserError for a forward pass to time that is longer than the model's positions."""
    length, longest = config.search.latency_length, Adapter(model).positions
    if length is not None and length > longest:
        raise UserError(f"search.latency_length = {length} exceeds the model's {longest} positions: lower it")


def removed_ratio(config: Config) -> float:
    """The removed share of every projection of a run for masks; UserError for N:M with another ratio than N / M."""
    ratio = config.masking.ratio
    if config.method != "nm":
        return 0.5 if ratio is None else ratio
    removed, group = parse_nm(config.masking.nm)
    if ratio not in (None, removed / group):
        conflict = f"masking.ratio = {ratio} contradicts masking.nm = {config.masking.nm}"
        raise UserError(
            f"{conflict}, which removes {removed / group:g}: leave it out (null), or use method unstructured"
        )
    return removed / group


def block_weights(adapter: Adapter) -> list[int]:
    """Weights of the seven projections of every block."""
    return [sum(block[role].weight.numel() for role in block.names) for block in adapter.blocks]
