"""What the rest of the refit and a search for widths are worth on the embedded model, one step after another.

All variants of a seed and ratio start from the same number of heads gone, so that the measured split decides nothing; a
search then moves heads and channels freely. Intervals are over seeds (see studies.py). An interrupted study continues
where it stopped.

    python -m scripts.studies.search_study --out scripts/results/search.json
"""

import sys

from scripts.studies.factor_study import HEAD, MANY, PRODUCERS, VISIBLE
from scripts.studies.fixed_heads import HEADS, heads_study, rows_of
from scripts.studies.studies import main

RATIOS = ["0.5", "0.7"]
SEARCH = {"search.enabled": True, "search.sequences": 40}
REFIT = MANY | PRODUCERS | HEAD | VISIBLE
LONG = rows_of(480, 1) | PRODUCERS | HEAD | VISIBLE
VARIANTS = {
    "today's recipe": MANY,
    "producers": MANY | PRODUCERS,
    "producers, head": MANY | PRODUCERS | HEAD,
    "producers, visible 0.5": MANY | PRODUCERS | VISIBLE,
    "whole refit": REFIT,
    "whole refit, knapsack": REFIT | SEARCH | {"search.method": "knapsack"},
    "480 windows, whole refit, knapsack": LONG | SEARCH | {"search.method": "knapsack"},
}
CONTRASTS = [
    ("producers", "today's recipe"),
    ("producers, head", "producers"),
    ("producers, visible 0.5", "producers"),
    ("whole refit", "producers"),
    ("whole refit", "today's recipe"),
    ("whole refit, knapsack", "whole refit"),
    ("480 windows, whole refit, knapsack", "whole refit, knapsack"),
    ("480 windows, whole refit, knapsack", "today's recipe"),
]
STUDY = heads_study(
    ("search_study", __doc__.splitlines()[0], "scripts/results/search.json"), VARIANTS, CONTRASTS,
    {ratio: HEADS[ratio] for ratio in RATIOS},
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STUDY))
