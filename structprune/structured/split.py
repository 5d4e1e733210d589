"""Heads against channels, measured: refitted candidates are compared on held-out text."""

from typing import Callable, Iterable


def search_heads(feasible: Iterable[int], start: int, measure: Callable[[int], float], fraction: int = 8) -> dict[int, float]:
    """Losses of the candidates a descent visits; the best of them is `min(found, key=found.get)`.

    It walks up from the fewest heads until two candidates in a row are worse than the best, because one head has cost
    far more than its share of channels wherever it was measured; then it looks at `start` and walks down from there.

    Args:
        feasible: numbers of attention steps per block that a plan can remove.
        start: a guess, such as what the scores predict to be cheapest.
        measure: steps -> held-out loss; called once per candidate.
        fraction: candidates are at most about this many, evenly spread, with `start` and the fewest among them.
    """
    choices = sorted(set(feasible))
    stride = max(1, -(-len(choices) // fraction))
    ladder = sorted({*choices[::stride], start})
    found: dict[int, float] = {}

    def look(heads: int) -> float:
        if heads not in found:
            found[heads] = measure(heads)
        return found[heads]

    worse = 0
    for heads in ladder:
        best = min(found.values(), default=float("inf"))
        worse = 0 if look(heads) < best else worse + 1
        if worse == 2:
            break
    place = ladder.index(start)
    while place >= 0 and look(ladder[place]) <= min(found.values()) and place > 0:
        place -= 1
    return found
