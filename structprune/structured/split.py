"""Heads against channels, measured: refitted candidates are compared on held-out text."""

from typing import Callable, Iterable


def search_heads(
    feasible: Iterable[int], measure: Callable[[int], float], coarse: int = 8, halvings: int = 2
) -> dict[int, float]:
    """Losses of the candidates a descent visits; the best of them is `min(found, key=found.get)`.

    It walks up from the fewest heads in about `coarse` even strides until two candidates in a row are worse than the
    best, then looks at both sides of the best, `halvings` times at half the stride.

    Args:
        feasible: numbers of attention steps that a plan can remove.
        measure: attention steps -> held-out loss; called once per candidate.
    """
    choices = sorted(set(feasible))
    stride = max(1, round(len(choices) / coarse))
    found: dict[int, float] = {}
    worse = 0
    for heads in choices[::stride]:
        best = min(found.values(), default=float("inf"))
        found[heads] = measure(heads)
        worse = 0 if found[heads] < best else worse + 1
        if worse == 2:
            break
    for _ in range(halvings):
        if stride == 1:
            break
        stride //= 2
        place = choices.index(min(found, key=found.__getitem__))
        for near in (place - stride, place + stride):
            if 0 <= near < len(choices) and choices[near] not in found:
                found[choices[near]] = measure(choices[near])
    return found
