"""Removal paths from fixed costs."""

import pytest
import torch

from structprune.structured.paths import per_unit, static_path, step_groups


def test_cheapest_first():
    path = static_path(torch.tensor([3.0, 1.0, 2.0]), [[0, 1, 2]])
    assert path.steps == ((1,), (2,), (0,)) and path.cost.tolist() == [1, 2, 3] and path.rank is None
    assert [path.removed(count) for count in range(4)] == [[], [1], [1, 2], [0, 1, 2]]


def test_a_step_takes_one_unit_of_every_group():
    path = static_path(
        torch.tensor([5.0, 1.0, 2.0, 9.0, 8.0, 7.0]), [[0, 1, 2], [3, 4, 5]], rank=torch.tensor([0.0, 1, 2, 3, 4, 5])
    )
    assert path.steps == ((1, 5), (2, 4), (0, 3))  # the k-th cheapest of each
    assert path.cost.tolist() == [8, 10, 14] and path.rank.tolist() == [3, 3, 1.5]  # sums, and means of the ranks
    assert path.removed(2) == [1, 2, 4, 5]


def test_groups_and_columns():
    assert step_groups(6, 2) == [[0, 1, 2], [3, 4, 5]] and step_groups(3, 1) == [[0, 1, 2]]
    assert per_unit(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2).tolist() == [3, 7]


def test_ties_keep_the_order_of_the_units():
    assert static_path(torch.ones(4), [[0, 1, 2, 3]]).steps == ((0,), (1,), (2,), (3,))


def test_unequal_groups_are_refused():
    with pytest.raises(ValueError):
        static_path(torch.ones(3), [[0, 1], [2]])
