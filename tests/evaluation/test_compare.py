"""Paired differences by hand."""

import pytest
import torch

from structprune.evaluation.compare import paired_difference


def test_by_hand():
    found = paired_difference(torch.tensor([3.0, 5.0, 10.0]), torch.tensor([2.0, 3.0, 4.0]))  # gaps 1, 2, 6
    error = 7**0.5 / 3**0.5
    assert found["mean"] == 3 and found["standard_error"] == pytest.approx(error)
    assert (found["low"], found["high"]) == pytest.approx((3 - 1.96 * error, 3 + 1.96 * error))


def test_pairing_removes_what_both_share():
    shared = torch.tensor([0.0, 100.0, -50.0])
    found = paired_difference(shared + 1, shared)
    assert found == {"mean": 1, "standard_error": 0, "low": 1, "high": 1}


def test_one_pair_has_no_error():
    assert paired_difference(torch.tensor([2.0]), torch.tensor([0.5])) == {
        "mean": 1.5, "standard_error": None, "low": None, "high": None,
    }  # fmt: skip


def test_unequal_numbers_cannot_be_paired():
    with pytest.raises(RuntimeError):
        paired_difference(torch.ones(3), torch.ones(2))
