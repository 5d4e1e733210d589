"""The table of mask scores: the statistic each needs, the arms it can use, and the function that makes its masks."""

from dataclasses import dataclass
from typing import Literal

from structprune.config import ARMS, register_name
from structprune.errors import UserError
from structprune.masking.patterns import pooled_mask
from structprune.masking.scores.linears import ByScores, MaskFunction
from structprune.masking.scores.magnitude import magnitude_scores
from structprune.masking.scores.ria import ria_scores
from structprune.masking.scores.sparsegpt import mask_linears
from structprune.masking.scores.wanda import wanda_scores

SINK = "sink-"  # prefix of a score's name that asks for an arm with sinks


@dataclass(frozen=True)
class MaskScore:
    """One score of single weights.

    Attributes:
        needs: the statistic of each input: "weights" for none, "norms" (C,), or "grams" (C, C).
        mask: `mask(linears, settings)` -> new weights and masks of the linears that read one input.
        arms: calibration arms it can use; none for a score of weights alone.
        default: the arm it uses unless told otherwise.
        options: keys of `MaskingSettings` that only some scores read, and this one does.
    """

    needs: Literal["weights", "norms", "grams"]
    mask: MaskFunction
    arms: tuple[str, ...] = ARMS
    default: str | None = "masked"
    options: tuple[str, ...] = ()


SCORES = {
    "magnitude": MaskScore("weights", ByScores(magnitude_scores, pooled_mask), (), None),
    "wanda": MaskScore("norms", ByScores(wanda_scores), options=("norms",)),
    "ria": MaskScore("norms", ByScores(ria_scores), options=("norms",)),
    "sparsegpt": MaskScore("grams", mask_linears, options=("damping", "column_block")),
}


def register_mask_score(name: str, score: MaskScore) -> None:
    """Add a score of your own, which `masking.score` then accepts; with activations also as `sink-NAME`.

    Raises:
        UserError: the name is taken, or starts with `sink-`.
    """
    if name in SCORES or name.startswith(SINK):
        raise UserError(f"mask score '{name}' exists already or starts with '{SINK}': choose another name")
    SCORES[name] = score
    register_name("masking.score", name)
    if score.arms:
        register_name("masking.score", f"{SINK}{name}")


def resolve_score(name: str, arm: str | None) -> tuple[str, str | None]:
    """A score's name without its `sink-`, and the arm it runs on; None for one that takes none.

    Raises:
        UserError: the score cannot use the arm.
    """
    base = name.removeprefix(SINK)
    score, sinks = SCORES[base], base != name
    if arm is None:
        return base, "masked+sink" if sinks else score.default
    if not score.arms:
        raise UserError(f"score '{name}' cannot use arm '{arm}': it looks at weights only; leave masking.arm unset")
    if sinks and not arm.endswith("+sink"):
        raise UserError(
            f"score '{name}' cannot use arm '{arm}', which ignores sinks: ask for '{base}', or for {arm}+sink"
        )
    return base, arm
