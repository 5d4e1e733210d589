"""Choices that contradict each other: a value that was changed although another leaves it without effect."""

from structprune.config import (
    DEFAULT_ARM,
    CalibrationSettings,
    Config,
    ExportSettings,
    MaskingSettings,
    ReconstructSettings,
    SinkSettings,
    StructuredSettings,
)
from structprune.errors import UserError

Idle = tuple[str, tuple[str, ...], bool, str]  # section, keys, whether they have no effect, what they need


def refuse_idle(config: Config, idle: tuple[Idle, ...]) -> None:
    """Raise UserError for the first key of `idle` that has no effect and yet differs from its default."""
    for section, keys, without_effect, need in idle:
        settings = getattr(config, section)
        fields = type(settings).model_fields
        changed = [key for key in keys if key != "enabled" and getattr(settings, key) != fields[key].default]
        if without_effect and changed:
            value = getattr(settings, changed[0])
            raise UserError(f"{section}.{changed[0]} = {value} has no effect without {need}: leave it out, or set that")


def _common(config: Config, arms: list[str]) -> tuple[Idle, ...]:
    """What holds for every method; `arms`: those that its score, allocation and refit use.

    The policy `none` makes an arm with +sink one without; a trajectory decides what noisy copies are, so every arm that
    looks at some takes it.
    """
    reconstruct, sink = config.reconstruct, config.sink
    weights = tuple(key for key in SinkSettings.model_fields if key != "trajectory")
    blind = all(arm in ("", "clean") for arm in arms)
    return (
        ("reconstruct", tuple(ReconstructSettings.model_fields), not reconstruct.enabled, "reconstruct.enabled = true"),
        ("reconstruct", ("damping",), reconstruct.mode == "bias", "reconstruct.mode = least-squares"),
        ("sink", weights, not any("sink" in arm for arm in arms), "an arm with +sink"),
        ("sink", ("mask", "alpha", "kappa", "scale_free"), sink.policy == "none", "sink.policy = all or unstable"),
        ("sink", ("trajectory",), blind, "an arm that is masked or has +sink"),
        ("sink", ("alpha", "scale_free"), sink.mask == "hard", "sink.mask = soft"),
        ("memory", ("overlap",), not _accelerated(config), "an accelerator"),
    )


def _accelerated(config: Config) -> bool:
    from torch import cuda  # late: `import structprune` is light

    return (config.model.device or ("cuda" if cuda.is_available() else "cpu")) != "cpu"


def check_structured(config: Config) -> None:
    """Raise UserError for a value that a structured run would ignore."""
    structured, reconstruct = config.structured, config.reconstruct
    scored = structured.arm or ("" if structured.score == "magnitude" else DEFAULT_ARM)
    arms = [scored, reconstruct.arm if reconstruct.enabled else ""]
    idle = (
        ("masking", tuple(MaskingSettings.model_fields), True, "method = unstructured or nm"),
        ("structured", ("damping", "rounds", "relative"), structured.score != "obs", "structured.score = obs"),
        ("structured", ("depth_slope",), structured.allocation != "depth", "structured.allocation = depth"),
    )
    refuse_idle(config, idle + _common(config, arms))


def check_masking(config: Config, base: str, arm: str | None, reads: bool) -> None:
    """Raise UserError for a value that an unstructured or N:M run would ignore.

    Args:
        base: the score without its `sink-`. arm: activations it sees, None for none.
        reads: whether anything of the run looks at calibration text.
    """
    masking, reconstruct = config.masking, config.reconstruct
    noisy = arm not in (None, "clean") or (arm is None and masking.allocation == "owl")
    noised = noisy or reconstruct.enabled or config.calibration.held_out > 0
    official = "method = structured (masks leave the layout as it is)"
    idle = (
        ("structured", tuple(StructuredSettings.model_fields), True, "method = structured"),
        ("export", tuple(ExportSettings.model_fields), True, official),
        ("reconstruct", ("constant", "mode"), reconstruct.enabled, official),
        ("masking", ("nm",), config.method != "nm", "method = nm"),
        ("masking", ("norms",), base not in ("wanda", "ria"), "masking.score = wanda or ria"),
        ("masking", ("order", "relative"), arm is None, "a score that looks at activations"),
        ("masking", ("damping", "column_block"), base != "sparsegpt", "masking.score = sparsegpt"),
        ("masking", ("column_block",), config.method == "nm", "method = unstructured"),
        ("masking", ("owl_threshold", "owl_spread"), masking.allocation != "owl", "masking.allocation = owl"),
        ("masking", ("depth_slope",), masking.allocation != "depth", "masking.allocation = depth"),
        ("calibration", tuple(key for key in CalibrationSettings.model_fields if key != "held_out"), not reads,
         "a score, refit or held-out check that looks at text"),
        ("calibration", ("steps", "interval"), not noised and not config.calibration.replays,
         "a noisy arm, a refit or a held-out check"),
        ("memory", ("offload", "overlap"), not reads, "a forward pass"),
    )  # fmt: skip
    seen = arm or ("masked" if masking.allocation == "owl" else "")  # where the score sees nothing, owl looks
    arms = [seen, reconstruct.arm if reconstruct.enabled else ""]
    refuse_idle(config, idle + _common(config, arms))
