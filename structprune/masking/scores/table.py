"""The table of scores for masks: what each needs, and on which arms it means something."""

from dataclasses import dataclass
from typing import Literal

from structprune.errors import UserError

ARMS = ("clean", "masked", "masked+sink", "clean+sink")
SINK = "sink-"  # prefix of a score's name that asks for an arm with sinks


@dataclass(frozen=True)
class Score:
    """What a score is computed from, the arms it can use, and the one it uses unless told otherwise."""

    needs: Literal["weights", "norms", "grams"]
    arms: tuple[str, ...]
    default: str | None


SCORES = {
    "magnitude": Score("weights", (), None),
    "wanda": Score("norms", ARMS, "masked"),
    "ria": Score("norms", ARMS, "masked"),
    "sparsegpt": Score("grams", ARMS, "masked"),
}


def resolve_score(name: str, arm: str | None) -> tuple[str, str | None]:
    """A score's name without its `sink-`, and the arm it runs on (None for one that takes none).

    Raises:
        UserError: the score cannot use the arm asked for.
    """
    base = name.removeprefix(SINK)
    score = SCORES[base]
    sinks = base != name
    if arm is None:
        return base, "masked+sink" if sinks else score.default
    if not score.arms:
        raise UserError(f"score '{name}' cannot use arm '{arm}': it looks at weights only; leave masking.arm unset")
    if sinks and not arm.endswith("+sink"):
        raise UserError(
            f"score '{name}' cannot use arm '{arm}', which ignores sinks: ask for '{base}', or for {arm}+sink"
        )
    return base, arm
