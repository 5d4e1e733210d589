"""Scores of single weights, by hand."""

import pytest
import torch

from structprune.masking.scores.magnitude import magnitude_scores
from structprune.masking.scores.ria import ria_scores
from structprune.masking.scores.wanda import wanda_scores

WEIGHT = torch.tensor([[3.0, -1.0], [-2.0, 4.0]])


def test_magnitude_by_hand():
    assert magnitude_scores(WEIGHT).tolist() == [[3, 1], [2, 4]]


def test_wanda_by_hand():
    assert wanda_scores(WEIGHT, torch.tensor([10.0, 0.5])).tolist() == [[30, 0.5], [20, 2]]


def test_wanda_norms_belong_to_columns():
    score = wanda_scores(torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0]).double())
    assert score.tolist() == [[1, 2, 3], [1, 2, 3]] and score.dtype == torch.float32


def test_ria_by_hand():
    score = ria_scores(WEIGHT, torch.tensor([9.0, 16.0]).double())  # rows sum to 4, 6; columns to 5, 5; roots 3, 4
    expected = [[3 * (3 / 4 + 3 / 5), 4 * (1 / 4 + 1 / 5)], [3 * (2 / 6 + 2 / 5), 4 * (4 / 6 + 4 / 5)]]
    assert score.flatten().tolist() == pytest.approx(sum(expected, []), rel=1e-6)
    assert score.dtype == torch.float32


def test_ria_survives_rows_and_columns_of_zeros():
    score = ria_scores(torch.tensor([[0.0, 0.0], [0.0, 5.0]]), torch.ones(2))
    assert score.tolist() == [[0, 0], [0, 2]]


@pytest.mark.parametrize("score", [wanda_scores, ria_scores])
def test_scores_of_low_precision_weights_are_fp32(score):
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = torch.rand(16, generator=torch.Generator().manual_seed(1)).double() + 0.1
    scores = score(weight, norm)
    assert scores.dtype == torch.float32 and torch.equal(scores, score(weight.float(), norm))
    assert magnitude_scores(weight).dtype == torch.float32
