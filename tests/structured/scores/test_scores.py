"""The pure scores against values computed by hand."""

import pytest
import torch

from structprune.structured.scores.fluctuation import fluctuation_ranks, fluctuation_scores
from structprune.structured.scores.magnitude import magnitude_scores
from structprune.structured.scores.taylor import taylor_scores
from structprune.structured.scores.wanda import wanda_scores

# a consumer of two units of two columns; squared column norms 1 + 4 = 5, 9, 0, 16 + 4 = 20
WEIGHT = torch.tensor([[1.0, 0.0, 0.0, 4.0], [2.0, -3.0, 0.0, -2.0]])


def test_magnitude_is_the_norm_over_all_coupled_slices():
    gate, bias, down = (
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        torch.tensor([[2.0], [-3.0]]),
        torch.tensor([[4.0], [4.0]]),
    )
    assert magnitude_scores([gate, bias, down]).tolist() == pytest.approx([5.0, 5.0])  # sqrt(1+4+4+16), sqrt(9+16)


def test_wanda_sums_weight_times_activation_over_a_units_columns():
    squared_norm = torch.tensor([2.0, 3.0, 100.0, 0.5]).double()
    assert wanda_scores(WEIGHT, squared_norm, 2).tolist() == [5 * 2 + 9 * 3, 0 * 100 + 20 * 0.5]
    assert wanda_scores(WEIGHT, squared_norm, 1).tolist() == [10, 27, 0, 10]


def test_fluctuation_is_the_mean_over_a_units_columns():
    variance = torch.tensor([2.0, 3.0, 100.0, 0.5]).double()
    assert fluctuation_scores(WEIGHT, variance, 2).tolist() == [37 / 2, 10 / 2]
    assert fluctuation_scores(WEIGHT, variance, 1).tolist() == [10, 27, 0, 10]


def test_fluctuation_ranks_standardise_the_columns_first():
    variance = torch.tensor([1.0, 1.0, 1.0, 1.0]).double()  # columns 5, 9, 0, 20: mean 8.5, squares 506
    deviation = (506 / 4 - 8.5**2) ** 0.5
    expected = [((5 - 8.5) + (9 - 8.5)) / 2 / deviation, ((0 - 8.5) + (20 - 8.5)) / 2 / deviation]
    assert fluctuation_ranks(WEIGHT, variance, 2).tolist() == pytest.approx(expected)
    assert fluctuation_ranks(WEIGHT, variance, 1).mean().item() == pytest.approx(0, abs=1e-12)
    assert fluctuation_ranks(torch.ones(2, 4), variance, 2).tolist() == [0, 0]  # all alike: no division by zero


def test_taylor_sums_absolute_products():
    gate, down = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[-3.0], [0.25]])
    assert taylor_scores([gate, down]).tolist() == [6.0, 0.75]
