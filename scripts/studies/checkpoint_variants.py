"""What the study of a checkpoint compares: the whole recipe with other methods, and its choices one at a time."""

from scripts.studies import factor_study
from scripts.studies.factor_study import HEAD, STREAM, VISIBLE
from scripts.studies.studies import CALIBRATION, CONSUMERS
from structprune.runs.demo import METHODS

RATIOS = ("0.5", "0.3")  # in the order of their runs
OPENINGS, GENERATED = 8, 32  # openings that are continued, and tokens after each
HELD_OUT = {"calibration.held_out": 16}
NO_HEADS, JOINT = {"structured.split": 0}, {"structured.split": "joint"}
TODAY = "32 windows x 5 copies"
BOTH = "160 x 1, producers, mixed targets"
STREAMED = "160 x 1, producers, stream"
GREEDY = "greedy refit (as OSSCAR, SlimGPT)"
WHOLE = "whole refit, stream"
SINKS = f"{WHOLE}, sink weights"
SEARCHED = f"{WHOLE}, search"
# one round on few sequences: with 30 blocks it measures some 200 levels, and takes longer than the rest of the run
SEARCH = {"search.enabled": True, "search.method": "knapsack", "search.rounds": 1, "search.sequences": 12}
TEXTLESS = {key: value for key, value in CALIBRATION.items() if key != "calibration.source"}
BASE = TEXTLESS | CONSUMERS | {"structured.arm": "masked"}


def factor(name: str) -> dict:
    """Keys of a variant of the factor study."""
    return factor_study.VARIANTS[name] | HELD_OUT


def equal(score: str) -> dict:
    """Keys of a published score as it was published: every block loses the same share, and nothing is refitted."""
    return factor_study.MANY | HELD_OUT | METHODS["magnitude"] | {"structured.score": score}


RECIPE = factor("160 x 1, producers") | JOINT | STREAM | HEAD | VISIBLE
VARIANTS = {
    TODAY: factor(TODAY) | NO_HEADS,
    STREAMED: factor("160 x 1, producers") | NO_HEADS | STREAM,
    WHOLE: RECIPE,
    SINKS: RECIPE | {"structured.arm": "masked+sink"},
    SEARCHED: RECIPE | SEARCH,
    GREEDY: factor("160 x 1") | JOINT,
    "FLAP": factor_study.MANY | HELD_OUT | METHODS["FLAP"],
    "Wanda-sp": equal("wanda"),
    "LLM-Pruner (Taylor)": equal("taylor"),
}
# at 0.3, where keeping every head loses less than the joint ranking that the other search starts from
KEPT_SEARCH = "heads kept, whole refit, stream, search"
KEPT = {KEPT_SEARCH: RECIPE | NO_HEADS | SEARCH}
KEPT_RATIOS = ("0.3",)
SEARCHING = (SEARCHED, KEPT_SEARCH)
BASELINES = (GREEDY, "FLAP", "Wanda-sp", "LLM-Pruner (Taylor)")
GENERATING = (WHOLE, SEARCHED, *BASELINES)  # whose generated text is measured, which takes as long as a refit
CONTRASTS = [
    *((name, TODAY) for name in (STREAMED, SEARCHED)),
    *((name, WHOLE) for name in (STREAMED, SINKS, SEARCHED, *BASELINES)),
    *((name, SEARCHED) for name in BASELINES),
]
PLAIN, MIXED = "160 x 1", "160 x 1, mixed targets"
FACTORS = {
    name: factor(name) | NO_HEADS
    for name in (TODAY, PLAIN, MIXED, "160 x 1, layer targets", "160 x 1, producers", BOTH)
} | {STREAMED: VARIANTS[STREAMED], f"{BOTH}, joint split": factor(BOTH) | JOINT}
FACTOR_CONTRASTS = [
    (PLAIN, TODAY),
    *((name, PLAIN) for name in FACTORS if name not in (TODAY, PLAIN)),
    (BOTH, "160 x 1, producers"),
    (STREAMED, "160 x 1, producers"),
    (f"{BOTH}, joint split", BOTH),
]
