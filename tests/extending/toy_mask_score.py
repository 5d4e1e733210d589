"""A mask score from outside the package: Wanda with the root of the input's norm."""

import structprune
from structprune.masking.scores.linears import ByScores
from structprune.masking.scores.table import MaskScore, register_mask_score


def root_wanda(weight, norm):
    """|W| · ‖X̃‖^½: weight (O, C), norm (C,) of its input -> scores (O, C); the lowest of every row are removed."""
    return weight.abs() * norm.float().sqrt()


register_mask_score("root-wanda", MaskScore("norms", ByScores(root_wanda), options=("norms",)))


def prune(checkpoint, text, score="root-wanda"):
    """Mask with it like with any other score; `sink-root-wanda` is the same on an arm with sinks."""
    changes = {"method": "unstructured", "masking.score": score, "masking.ratio": 0.5, "calibration.source": text}
    changes |= {"calibration.length": 32, "calibration.windows": 4, "calibration.held_out": 2}
    changes |= {"calibration.interval": 25, "reconstruct.enabled": False}
    return structprune.prune(structprune.load_model(checkpoint), structprune.Config.load(overrides=changes))
