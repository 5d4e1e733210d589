"""Words and figures of tables."""

import pytest
import torch

from structprune.evaluation.compare import paired_difference
from structprune.report.tables import change, gigabytes, millions, plus_minus


def test_a_paired_difference_in_words():
    gaps = torch.tensor([1.0, 2.0, 3.0])
    assert plus_minus(paired_difference(gaps, torch.zeros(3))) == "+2.0000 ± 0.5774"  # 1 / sqrt(3)
    assert plus_minus(paired_difference(-gaps[:1], torch.zeros(1))) == "-1.0000, one window: no error known"


@pytest.mark.parametrize(
    "shown, text",
    [
        (millions(8_015_581_184), "8.016 B"),
        (millions(5_100_000), "5.100 M"),
        (gigabytes(999_000_000), "999.00 MB"),
        (gigabytes(2_500_000_000), "2.50 GB"),
        (change(200, 150), "-25.0 %"),
        (change(0, 1), ""),
    ],
)
def test_figures(shown, text):
    assert shown == text
