"""A structured score from outside the package: channels and heads whose inputs are small on average go first."""

import structprune
from structprune.structured.paths import static_path
from structprune.structured.scores.table import Score, register_score


def mean_input(units, moments, settings):
    """Σ_c |mean x_c| over a unit's columns; `moments` has the (C,) mean and variance of its consumer's input."""
    return static_path(moments.mean.abs().view(units.count, -1).sum(1), units.groups)


register_score("mean-input", Score("moments", mean_input))


def prune(checkpoint, text):
    """Prune with it like with any other score."""
    changes = {"structured.score": "mean-input", "structured.arm": "masked", "structured.ratio": 0.3}
    changes |= {"structured.split": "equal", "calibration.source": text, "calibration.length": 32}
    changes |= {"calibration.windows": 4, "calibration.held_out": 2, "calibration.interval": 25}
    return structprune.prune(structprune.load_model(checkpoint), structprune.Config.load(overrides=changes))
