"""How broad a text to learn from is: a model that learns a narrow one well may lose what it knew of everything else.

Shapes: N windows, T tokens.
"""

import numpy as np

from structprune.evaluation.overlap import learnt_runs
from structprune.recovery.text import RecoveryText

EPOCHS = 4  # up to here repeated text is nearly worth new text (Muennighoff et al., arXiv 2305.16264)
RUN, DIFFERENT = 8, 0.5  # of all runs of so many tokens, the least share of different ones; prose has over 0.9
SAMPLE = 1_000_000  # tokens whose runs are counted
ONE_KIND = "wikitext"  # in a source's name


def breadth_of(text: RecoveryText, windows: int) -> dict[str, float | None]:
    """Measures of a text that is learnt from, as plain data.

    Args:
        windows: to learn, repeats counted.
    Returns:
        `tokens` of the text, `epochs` over it, and `different`, the share of different ones among all runs of RUN
        tokens in SAMPLE tokens of it; None where no window is as long as a run.
    """
    count, length = text.windows.shape
    first = max(1, SAMPLE // length)
    runs = np.concatenate(list(learnt_runs(text.windows[:first], text.learnt, RUN)))
    different = len(np.unique(runs)) / len(runs) if len(runs) else None
    return {"tokens": count * length, "epochs": windows / count, "different": different}


def narrow_line(source: str, breadth: dict, keys: str = "train.tokens") -> str | None:
    """One line where a text is narrow, with a remedy; None of other text.

    Args:
        source: its name, without a path. breadth: of `breadth_of`. keys: settings of how much is learnt.
    """
    reasons = []
    if breadth["epochs"] > EPOCHS:
        reasons.append(f"its {breadth['tokens']:,} tokens are repeated {breadth['epochs']:.1f} times")
    if breadth["different"] is not None and breadth["different"] < DIFFERENT:
        reasons.append(f"only {breadth['different']:.0%} of its runs of {RUN} tokens are different")
    if ONE_KIND in source.lower():
        reasons.append("it is of one encyclopaedia")
    if not reasons:
        return None
    return (
        f"the text '{source}' is narrow ({', '.join(reasons)}), and what it lacks may be unlearnt: give text as broad"
        f" as what the model is for (such as data.source = c4), or lower {keys}"
    )
