"""Names that a configuration accepts: of calibration arms, and of scores registered from outside the package."""

from typing import Any, Literal, get_args

from pydantic import WrapValidator

Arm = Literal["clean", "masked", "masked+sink", "clean+sink"]
ARMS: tuple[Arm, ...] = get_args(Arm)
REGISTERED: dict[str, set[str]] = {"structured.score": set(), "masking.score": set()}


def register_name(key: str, name: str) -> None:
    """Let a key of the configuration, such as `structured.score`, take a further name."""
    REGISTERED[key].add(name)


def or_registered(key: str) -> WrapValidator:
    """A validator for a `Literal` field: registered names pass, others are validated as the field says."""

    def validate(value: Any, handler) -> Any:
        return value if isinstance(value, str) and value in REGISTERED[key] else handler(value)

    return WrapValidator(validate)
