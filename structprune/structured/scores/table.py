"""The table of structured scores: what each needs and on which arms it means something."""

from dataclasses import dataclass
from typing import Literal

from structprune.config import DEFAULT_ARM
from structprune.errors import UserError

ARMS = ("clean", "masked", "masked+sink", "clean+sink")


@dataclass(frozen=True)
class Criterion:
    """One score: what it is computed from, and the calibration arms it can use."""

    needs: Literal["weights", "moments", "grams", "gradients"]
    arms: tuple[str, ...]
    why: str = ""


CRITERIA = {
    "magnitude": Criterion("weights", (), "it looks at weights only"),
    "wanda": Criterion("moments", ARMS),
    "fluctuation": Criterion("moments", ARMS),
    "taylor": Criterion("gradients", ("masked", "masked+sink"), "clean text has no masked token, so no loss"),
    "obs": Criterion("grams", ARMS),
}


def resolve_arm(score: str, arm: str | None) -> str | None:
    """The arm a score runs on: the one asked for, else `DEFAULT_ARM` (None for a score that takes none).

    Raises:
        UserError: the score cannot use that arm.
    """
    criterion = CRITERIA[score]
    if arm is None:
        return DEFAULT_ARM if criterion.arms else None
    if arm not in criterion.arms:
        usable = ", ".join(criterion.arms) or "none (leave structured.arm unset)"
        raise UserError(f"score '{score}' cannot use arm '{arm}': {criterion.why}; usable: {usable}")
    return arm
