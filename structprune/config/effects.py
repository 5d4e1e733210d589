"""Choices that contradict each other: a value that was changed although another leaves it without effect."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from structprune.config.sections import Sections
from structprune.config.settings import (
    CalibrationSettings,
    Config,
    ExportSettings,
    MaskingSettings,
    ReconstructSettings,
    SearchSettings,
    SinkSettings,
    StructuredSettings,
)
from structprune.errors import UserError

DENSE_TARGETS = ("producers", "head", "stream")  # keys of a refit that compare with the dense model's hidden states
CAUSAL = "a model that is causal too (Nemotron-Labs-Diffusion)"  # what some settings need
READING = "a score or refit that reads text"
Idle = tuple[str, tuple[str, ...], bool, str]  # section, keys, whether they have no effect, what would give them one


@dataclass(frozen=True)
class Facts:
    """What the rules depend on beside the configuration itself."""

    score: str  # its name, without `sink-`
    arm: str | None  # the calibration arm it runs on; None for a score of weights alone
    scores: Mapping[str, Any]  # the table; `options` of a row are those that only some scores read, and this one does
    accelerator: bool  # whether the run computes on one
    reads_text: bool = True  # whether any part of the run reads calibration text


def refuse_idle(config: Sections, idle: Sequence[Idle]) -> None:
    """Raise UserError for the first key of `idle` that has no effect and yet differs from its default."""
    for section, keys, without_effect, need in idle:
        settings = getattr(config, section)
        fields = type(settings).model_fields
        changed = [key for key in keys if key != "enabled" and getattr(settings, key) != fields[key].default]
        if without_effect and changed:
            value = getattr(settings, changed[0])
            raise UserError(f"{section}.{changed[0]} = {value} has no effect without {need}: leave it out, or set that")


def check_structured(config: Config, facts: Facts) -> None:
    """Raise UserError for a value that a structured run would ignore."""
    structured, reconstruct = config.structured, config.reconstruct
    _check_dense_targets(reconstruct)
    idle = (
        ("masking", tuple(MaskingSettings.model_fields), True, "method = unstructured or nm"),
        *_score_options("structured", facts),
        ("reconstruct", ("visible", "weighting"), reconstruct.arm.startswith("clean"), "a masked reconstruct.arm"),
        ("structured", ("depth_slope",), structured.allocation != "depth", "structured.allocation = depth"),
        *_search_options(config),
        ("calibration", ("causal",), facts.arm is None and not reconstruct.enabled, READING),
    )
    refuse_idle(config, (*idle, *_common(config, facts, facts.arm)))


def _check_dense_targets(reconstruct: ReconstructSettings) -> None:
    """Raise UserError for a refit towards the dense model's hidden states where none are compared.

    Their defaults are then off (see ReconstructSettings), so that what is on was asked for.
    """
    needs = [("enabled = true", not reconstruct.enabled)]
    needs += [("target = dense or mixed", reconstruct.target == "layer")]
    needs += [("mode = least-squares", reconstruct.mode == "bias")]
    for need in (need for need, lacking in needs if lacking):
        for key in _on(reconstruct, DENSE_TARGETS):
            problem = f"reconstruct.{key} = {getattr(reconstruct, key)} has no effect without reconstruct.{need}"
            raise UserError(f"{problem}: leave it out, or set that")


def _on(reconstruct: ReconstructSettings, keys: Sequence[str]) -> list[str]:
    """Those that are not switched off, as where nothing reads them."""
    return [key for key in keys if getattr(reconstruct, key)]


def _search_options(config: Config) -> list[Idle]:
    """What a search ignores, and what ignores it."""
    search = config.search
    of_widths = tuple(key for key in SearchSettings.model_fields if key not in ("enabled", "whole", "sequences"))
    evolves, by_latency = "search.method = both or evolution", search.budget == "latency"
    return [
        ("search", tuple(SearchSettings.model_fields), not search.enabled, "search.enabled = true"),
        ("search", of_widths, config.drops_blocks, "export.compat = free"),
        ("search", ("generations", "offspring"), search.method == "knapsack", evolves),
        ("search", ("target_ms", "latency_batch", "latency_length"), not by_latency, "search.budget = latency"),
        ("structured", ("ratio",), by_latency, "search.budget = parameters or macs"),
    ]


def check_search(config: Config) -> None:
    """Raise UserError for a search that a structured run cannot make."""
    if not config.search.enabled:
        return
    compat, drops = config.export.compat, config.drops_blocks
    allocation = "uniform" if drops else "global"
    needs = {
        "reconstruct.enabled": ("true", config.reconstruct.enabled),
        "reconstruct.mode": ("least-squares", config.reconstruct.mode == "least-squares"),
        "structured.allocation": (allocation, config.structured.allocation == allocation),
        "search.whole": ("true", config.search.whole or not drops),
    }
    for key, (value, holds) in needs.items():
        if not holds:
            search = "search.enabled = true" + f" with export.compat = {compat}" * drops
            raise UserError(f"{search} needs {key} = {value}: set that, or leave the search out")
    if config.search.budget != "latency":
        return
    if config.search.target_ms is None:
        raise UserError("search.budget = latency needs milliseconds: set search.target_ms, or another budget")
    if config.memory.offload:
        raise UserError(
            "search.budget = latency would time copies of weights with memory.offload = true: turn one of them off"
        )


def check_masking(config: Config, facts: Facts) -> None:
    """Raise UserError for a value that an unstructured or N:M run would ignore."""
    masking, reconstruct, calibration = config.masking, config.reconstruct, config.calibration
    if config.search.enabled:
        raise UserError("search.enabled = true has no effect on masks: leave it out, or use method = structured")
    if reconstruct.enabled and reconstruct.target == "mixed":
        raise UserError("reconstruct.target = mixed has no effect on masks: use dense or layer")
    measured = facts.arm or ("masked" if masking.allocation == "owl" else None)  # `owl` reads activations by itself
    noised = measured not in (None, "clean") or reconstruct.enabled or calibration.held_out > 0
    official = "method = structured (masks leave the layout as it is)"
    for key in _on(reconstruct, DENSE_TARGETS):  # off by default (see Config), so that it was asked for
        problem = f"reconstruct.{key} = {getattr(reconstruct, key)} has no effect without {official}"
        raise UserError(f"{problem}: leave it out, or set that")
    of_structured = ("constant", "mode", "visible", "weighting")
    text = tuple(key for key in CalibrationSettings.model_fields if key != "held_out")
    idle = (
        ("structured", tuple(StructuredSettings.model_fields), True, "method = structured"),
        ("search", tuple(SearchSettings.model_fields), True, "method = structured"),
        ("export", tuple(ExportSettings.model_fields), True, official),
        ("reconstruct", of_structured, reconstruct.enabled, official),
        ("masking", ("nm",), config.method != "nm", "method = nm"),
        ("masking", ("order", "relative"), facts.arm is None, "a score that looks at activations"),
        *_score_options("masking", facts),
        ("masking", ("column_block",), config.method == "nm", "method = unstructured"),
        ("masking", ("owl_threshold", "owl_spread"), masking.allocation != "owl", "masking.allocation = owl"),
        ("masking", ("depth_slope",), masking.allocation != "depth", "masking.allocation = depth"),
        ("calibration", text, not facts.reads_text, "a score, refit or held-out check that looks at text"),
        ("calibration", ("causal",), measured is None and not reconstruct.enabled, READING),
        ("calibration", ("steps", "interval", "copies"), not noised and not calibration.replays,
         "a noisy arm, a refit or a held-out check"),
        ("memory", ("budget_gb", "overlap", "rehearsal"), not facts.reads_text, "a forward pass"),
        ("memory", ("offload",), not facts.reads_text and config.memory.offload is True, "a forward pass"),
    )  # fmt: skip
    refuse_idle(config, (*idle, *_common(config, facts, measured)))


def _score_options(section: str, facts: Facts) -> list[Idle]:
    """Options that only some scores read."""
    users: dict[str, list[str]] = {}
    for name, row in facts.scores.items():
        for option in row.options:
            users.setdefault(option, []).append(name)
    return [
        (section, (option,), facts.score not in names, f"{section}.score = {' or '.join(names)}")
        for option, names in users.items()
    ]


def _common(config: Config, facts: Facts, measured: str | None) -> list[Idle]:
    """What holds for every method.

    The policy `none` makes an arm with +sink equal to one without. A trajectory decides what noisy copies are, so it
    matters to every arm that reads some.

    Args:
        measured: the arm of score or allocation, None where neither reads activations.
    """
    reconstruct, sink = config.reconstruct, config.sink
    arms = [measured or "", reconstruct.arm if reconstruct.enabled else ""]
    refit = tuple(key for key in ReconstructSettings.model_fields if key not in DENSE_TARGETS)
    refit += tuple(_on(reconstruct, DENSE_TARGETS))
    weights = tuple(key for key in SinkSettings.model_fields if key != "trajectory")
    blind = all(arm in ("", "clean") for arm in arms)
    return [
        ("reconstruct", refit, not reconstruct.enabled, "reconstruct.enabled = true"),
        ("reconstruct", ("dense_share",), reconstruct.target != "mixed", "reconstruct.target = mixed"),
        ("reconstruct", ("damping",), reconstruct.mode == "bias", "reconstruct.mode = least-squares"),
        ("sink", weights, not any("sink" in arm for arm in arms), "an arm with +sink"),
        ("sink", ("mask", "alpha", "kappa", "scale_free"), sink.policy == "none", "sink.policy = all or unstable"),
        ("sink", ("trajectory",), blind, "an arm that is masked or has +sink"),
        ("calibration", ("copies",), config.calibration.replays, "text, not a saved set, as calibration.source"),
        ("sink", ("alpha", "scale_free"), sink.mask == "hard", "sink.mask = soft"),
        ("memory", ("overlap", "device_gb"), not facts.accelerator, "an accelerator"),
    ]
