"""The search over numbers of heads."""

from structprune.structured.choose import search_heads


def test_a_valley_is_found_with_few_measurements():
    calls = []

    def loss(heads):
        calls.append(heads)
        return (heads - 21) ** 2

    losses = search_heads(range(0, 64), loss, coarse=8, halvings=3)
    assert min(losses, key=losses.__getitem__) == 21
    assert len(calls) == len(set(calls)) == len(losses) < 14
    assert losses[21] == 0 and all(losses[heads] == (heads - 21) ** 2 for heads in losses)


def test_it_stops_after_two_that_are_worse():
    losses = search_heads(range(8), lambda heads: heads, coarse=8)
    assert sorted(losses) == [0, 1, 2]


def test_one_bump_is_walked_over():
    losses = search_heads(range(6), [3, 4, 2, 1, 5, 6].__getitem__, coarse=8)
    assert min(losses, key=losses.__getitem__) == 3


def test_only_feasible_numbers_are_measured():
    feasible = [2, 5, 6, 9]
    assert set(search_heads(feasible, lambda heads: -heads, coarse=2, halvings=4)) <= set(feasible)
    assert search_heads([7], lambda heads: 1.5) == {7: 1.5}
