"""The configuration of `prune` and `inspect`, from a file, --set and the options that name a key."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from structprune.errors import UserError

if TYPE_CHECKING:
    from structprune.config import Config, ModelSettings

OF_METHOD = ("score", "arm")  # keys that the sections structured and masking both have


def read_config(
    file: Path | None,
    ratio: float | None,
    sets: list[str] | None,
    nm: str | None,
    options: dict[str, Any],
    target_latency: float | None = None,
) -> "Config":
    """The run's configuration: the file, then --set, then the options, which count most.

    Args:
        options: configuration key -> value of the option that names it; None where it was not given. A key without a
            section is of `structured` or `masking`, as the method says.
    Raises:
        UserError: an option that contradicts another or has no effect.
    """
    from structprune.config import Config

    options = options | {"masking.nm": nm and f"'{nm}'"}
    given = {key: value for key, value in options.items() if value is not None}
    overrides = [*(sets or []), *(f"{key}={value}" for key, value in given.items() if key not in OF_METHOD)]
    section = "structured" if Config.load(file, overrides).method == "structured" else "masking"
    overrides += [f"{section}.{key}={given[key]}" for key in OF_METHOD if key in given]
    keys = set_keys(sets)
    if nm is not None and ratio is None and "masking.ratio" not in keys:
        overrides.append("masking.ratio=null")  # a preset's ratio belongs to its own pattern
    if target_latency is not None:
        overrides += _latency_overrides(Config.load(file, overrides), target_latency, ratio, keys)
    if ratio is not None:
        key = f"{section}.ratio"
        if key in keys:
            raise UserError(f"--ratio {ratio} and --set {key} both set the ratio: leave one out")
        overrides.append(f"{key}={ratio}")
    config = Config.load(file, overrides)
    if nm is not None and config.method != "nm":
        raise UserError(f"--nm {nm} has no effect with method {config.method}: add --method nm, or leave it out")
    if ratio is not None and config.search.enabled and config.search.budget == "latency":
        raise UserError(f"search.budget = latency decides how much goes: leave out --ratio {ratio}")
    _check_method(config.method, keys)
    return config


def read_ratios(text: str | None) -> list[float]:
    """The ratios of --ratio, in rising order; none where it was not given.

    Raises:
        UserError: a ratio that is there twice.
    """
    ratios = [] if text is None else [float(part) for part in text.split(",")]
    if len(set(ratios)) < len(ratios):
        raise UserError(f"--ratio {text} has a ratio twice: give each once")
    return sorted(ratios)


def read_ratio(text: str | None) -> float | None:
    """The ratio of a verb that takes one.

    Raises:
        UserError: several.
    """
    ratios = read_ratios(text)
    if len(ratios) > 1:
        raise UserError(f"--ratio {text} has several ratios: give one at a time")
    return ratios[0] if ratios else None


def _latency_overrides(config: "Config", target: float, ratio: float | None, keys: set[str]) -> list[str]:
    """What --target-latency sets.

    Args:
        config: the run's without it. keys: those that --set names.
    Raises:
        UserError: an option or key that contradicts it.
    """
    option = f"--target-latency {target:g}"
    if ratio is not None:
        raise UserError(f"{option} decides how much goes: leave out --ratio {ratio}")
    if config.method != "structured":
        raise UserError(f"{option} has no effect with method {config.method}: add --method structured, or leave it out")
    if (compat := config.export.compat) != "free":
        raise UserError(f"{option} takes widths that differ by block: set export.compat = free, not {compat}")
    if "enabled" in config.search.model_fields_set and not config.search.enabled:
        raise UserError(f"{option} is met by a search: leave out search.enabled = false")
    for key in ("search.budget", "search.target_ms", "structured.ratio"):
        if key in keys:
            raise UserError(f"{option} and --set {key} both say how much goes: leave one out")
    default = type(config.structured).model_fields["ratio"].default  # a preset's ratio is not this run's
    return [
        "search.enabled=true", "search.budget=latency", f"search.target_ms={target}", f"structured.ratio={default}",
    ]  # fmt: skip


def read_model_settings(
    device: str | None, dtype: str | None, mask_id: int | None, block_size: int | None, allow_pickle: bool
) -> "ModelSettings":
    """How checkpoints are loaded by the verbs that have no --set."""
    from structprune.config import Config

    values = {
        "device": device,
        "dtype": dtype,
        "mask_id": mask_id,
        "block_size": block_size,
        "allow_pickle": allow_pickle,
    }
    try:
        return Config.load(overrides={f"model.{name}": value for name, value in values.items()}).model
    except UserError as error:  # these verbs have options in place of keys
        name = next((name for name in values if f"key model.{name} " in str(error)), None)
        if name is None:
            raise
        option = "--" + name.replace("_", "-")
        raise UserError(str(error).replace(f"config key model.{name}", option)) from error


def set_keys(sets: list[str] | None) -> set[str]:
    """The keys that --set names."""
    return {text.partition("=")[0].strip() for text in sets or []}


def _check_method(method: str, keys: set[str]) -> None:
    """Refuse keys of another method: a value equal to the default would go unnoticed later."""
    structured = method == "structured"
    prefixes = ("masking.",) if structured else ("structured.", "export.")
    idle = sorted(key for key in keys if key.startswith(prefixes) or (key == "masking.nm" and method != "nm"))
    if idle:
        other = "nm" if idle[0] == "masking.nm" else "unstructured or nm" if structured else "structured"
        raise UserError(f"--set {idle[0]} has no effect with method {method}: add --method {other}, or leave it out")
