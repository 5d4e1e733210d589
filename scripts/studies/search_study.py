"""What the rest of the refit and a search for widths are worth on the embedded model, one step after another.

All variants of a seed and ratio start from the same number of heads gone, so that the measured split decides nothing; a
search then moves heads and channels freely. Intervals are over seeds (see studies.py). An interrupted study continues
where it stopped.

    python -m scripts.studies.search_study --out scripts/results/search.json
"""

import sys

from scripts.studies.factor_study import HEAD, MANY, PRODUCERS, STREAM, VISIBLE
from scripts.studies.fixed_heads import HEADS, heads_study, rows_of
from scripts.studies.studies import main

RATIOS = ["0.5", "0.7"]
SEARCH = {"search.enabled": True, "search.sequences": 40}
KNAPSACK = SEARCH | {"search.method": "knapsack"}
REFIT = MANY | PRODUCERS | HEAD | VISIBLE
STREAMED = REFIT | STREAM
# three times the sequences that choose: damping and widths are chosen on them
MORE_HELD_OUT = {"calibration.held_out": 120, "search.sequences": 120}
SEARCHED = "whole refit, stream, knapsack"
LONG = "480 windows, 120 held out, whole refit, stream, knapsack"
VARIANTS = {
    "today's recipe": MANY,
    "producers": MANY | PRODUCERS,
    "producers, head": MANY | PRODUCERS | HEAD,
    "whole refit": REFIT,
    "whole refit, stream": STREAMED,
    SEARCHED: STREAMED | KNAPSACK,
    LONG: STREAMED | rows_of(480, 1) | KNAPSACK | MORE_HELD_OUT,
    "whole refit, stream, knapsack of parts": STREAMED | KNAPSACK | {"search.whole": False},
    "whole refit, stream, knapsack and evolution": STREAMED | SEARCH,
}
CONTRASTS = [
    ("producers", "today's recipe"),
    ("producers, head", "producers"),
    ("whole refit", "producers, head"),
    ("whole refit, stream", "whole refit"),
    ("whole refit, stream", "today's recipe"),
    (SEARCHED, "whole refit, stream"),
    (SEARCHED, "today's recipe"),
    (LONG, SEARCHED),
    (LONG, "today's recipe"),
    ("whole refit, stream, knapsack of parts", SEARCHED),
    ("whole refit, stream, knapsack and evolution", SEARCHED),
]
STUDY = heads_study(
    ("search_study", __doc__.splitlines()[0], "scripts/results/search.json"), VARIANTS, CONTRASTS,
    {ratio: HEADS[ratio] for ratio in RATIOS},
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STUDY))
