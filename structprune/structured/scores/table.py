"""The table of structured scores: the statistic each needs, the arms it can use, and the function that ranks units."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from structprune.config import ARMS, DEFAULT_ARM, StructuredSettings, register_name
from structprune.errors import UserError
from structprune.structured.paths import RemovalPath
from structprune.structured.scores import fluctuation, magnitude, obs, taylor, wanda
from structprune.structured.units import Units


@dataclass(frozen=True)
class Score:
    """One structured score.

    Attributes:
        needs: the statistic, collected in `structured.ranking`. "weights": slices (U, n_i) of the coupled weights.
            "moments": `Moments` of the consumer's C input features. "grams": their Gram matrix (C, C). "gradients":
            slices (U, n_i) of gradient times weight.
        path: `path(units, statistic, settings)` -> the order in which units go; costs and ranks are finite, save for
            the last step's cost.
        arms: calibration arms it can use; none for a score of weights alone.
        reason: why it cannot use the others.
        options: keys of `StructuredSettings` that only some scores read, and this one does.
    """

    needs: Literal["weights", "moments", "grams", "gradients"]
    path: Callable[[Units, Any, StructuredSettings], RemovalPath]
    arms: tuple[str, ...] = ARMS
    reason: str = "it has no such arm"
    options: tuple[str, ...] = ()


SCORES = {
    "magnitude": Score("weights", magnitude.path, (), "it looks at weights only"),
    "wanda": Score("moments", wanda.path),
    "fluctuation": Score("moments", fluctuation.path),
    "taylor": Score("gradients", taylor.path, ("masked", "masked+sink"), "clean text has no masked token, so no loss"),
    "obs": Score("grams", obs.path, options=("damping", "rounds", "relative")),
}


def register_score(name: str, score: Score) -> None:
    """Add a score of your own, which `structured.score` then accepts.

    Raises:
        UserError: the name is taken.
    """
    if name in SCORES:
        raise UserError(f"structured score '{name}' exists already: choose another name")
    SCORES[name] = score
    register_name("structured.score", name)


def resolve_arm(score: str, arm: str | None) -> str | None:
    """The arm a score runs on: the one asked for, else `DEFAULT_ARM`; None for a score that takes none.

    Raises:
        UserError: the score cannot use that arm.
    """
    row = SCORES[score]
    if arm is None:
        return (DEFAULT_ARM if DEFAULT_ARM in row.arms else row.arms[0]) if row.arms else None
    if arm not in row.arms:
        usable = ", ".join(row.arms) or "none (leave structured.arm unset)"
        raise UserError(f"score '{score}' cannot use arm '{arm}': {row.reason}; usable: {usable}")
    return arm
