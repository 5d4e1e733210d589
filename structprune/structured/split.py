"""Heads against channels: refitted candidates compared on held-out text."""

from collections.abc import Callable, Iterable


def search_heads(
    feasible: Iterable[int], measure: Callable[[int], float], coarse: int = 8, halvings: int = 2
) -> dict[int, float]:
    """Losses of the candidates that a descent visits; the best is `min(losses, key=losses.get)`.

    It starts at the fewest heads and goes up in about `coarse` even strides until two candidates in a row are
    worse than the best. Then it tries both sides of the best, `halvings` times at half the stride.

    Args:
        feasible: numbers of attention steps that a plan can remove.
        measure: attention steps -> held-out loss; called once per candidate.
    """
    choices = sorted(set(feasible))
    stride = max(1, round(len(choices) / coarse))
    losses: dict[int, float] = {}
    worse = 0
    for heads in choices[::stride]:
        best = min(losses.values(), default=float("inf"))
        losses[heads] = measure(heads)
        worse = 0 if losses[heads] < best else worse + 1
        if worse == 2:
            break
    for _ in range(halvings):
        if stride == 1:
            break
        stride //= 2
        place = choices.index(min(losses, key=losses.__getitem__))
        for near in (place - stride, place + stride):
            if 0 <= near < len(choices) and choices[near] not in losses:
                losses[choices[near]] = measure(choices[near])
    return losses
