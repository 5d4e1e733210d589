"""How many sequences go through a model at once."""

import pytest

from structprune.models.adapter import Adapter
from structprune.statistics.scan import Limits, Scan


@pytest.mark.parametrize(
    "windows, copies, length, expected",
    [(1, 10, 128, 10), (4, 10, 128, 40), (1, 10, 4096, 2), (8, 1, 2048, 4), (1, 10, 819, 10), (1, 10, 9000, 1)],
)
def test_sequences_in_a_pass(windows, copies, length, expected):
    assert Limits(windows).sequences(copies, length) == expected
    assert Limits(windows, batch=7).sequences(copies, length) == 7


def test_a_scan_counts_all_noise_levels_unless_told_otherwise(tiny_model, calibration):
    scan = Scan(Adapter(tiny_model()), calibration, limits=Limits(windows=3))  # two levels
    assert (scan.sequences(), scan.sequences(1)) == (6, 3)
