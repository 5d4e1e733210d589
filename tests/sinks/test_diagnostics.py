"""Every diagnostic by hand."""

import math

import pytest
import torch

from structprune.sinks import diagnostics
from structprune.statistics.policies import instability, survival

NONE = torch.nan


def close(result, expected):
    return torch.allclose(result, torch.tensor(expected, dtype=result.dtype), atol=1e-6, equal_nan=True)


def test_spatial_variance_is_of_the_mean_over_steps():
    mass = torch.tensor([[1.0, 5.0, 0.0], [3.0, 1.0, 2.0]])  # means 2, 3, 1: their variance 2/3
    assert close(diagnostics.spatial_variance(mass), 2 / 3)
    assert close(diagnostics.spatial_variance(torch.stack((mass, 2 * mass))), [2 / 3, 8 / 3])


PHI = torch.tensor([
    [0.0, 0.6, 0.0, 0.2],  # centroid (0.6 + 0.6) / 0.8 = 1.5
    [0.4, 0.4, 0.4, 0.4],  # no sink
    [0.0, 0.0, 0.0, 0.9],  # 3
    [0.8, 0.0, 0.8, 0.0],  # 1
])  # fmt: skip


def test_centroid_and_spread():
    assert close(diagnostics.centroids(PHI), [1.5, NONE, 3.0, 1.0])
    first = math.sqrt((0.6 * 0.25 + 0.2 * 2.25) / 0.8)
    assert close(diagnostics.spreads(PHI), [first, NONE, 0.0, 1.0])


def test_temporal_variance_leaves_out_steps_without_a_sink():
    mean = 5.5 / 3
    expected = ((1.5 - mean) ** 2 + (3 - mean) ** 2 + (1 - mean) ** 2) / 3
    assert close(diagnostics.temporal_variance(PHI), expected)
    assert diagnostics.temporal_variance(PHI[:2]).isnan()  # one step with a sink is no variance
    assert close(diagnostics.temporal_variance(torch.stack((PHI, PHI))), [expected, expected])


def test_instability_and_survival():
    assert close(instability(PHI)[0], (0.09 + 0.01 + 0.09 + 0.25) / 4)  # 0, .4, 0, .8
    assert close(survival(PHI), [0.25, 0.25, 0.25, 0.25])
    present = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]]).bool()
    assert close(survival(PHI, present), [0.25, 0.5, 0.5, NONE])
    assert close(instability(PHI, present)[1:], [0.01, 0.16, NONE])


def test_sinks_that_stay_at_the_next_step():
    phi = torch.tensor([[0.9, 0.9, 0.0], [0.9, 0.0, 0.0], [0.0, 0.0, 0.9], [0.0, 0.0, 0.0], [0.9, 0.0, 0.0]])
    assert close(diagnostics.retention(phi), [0.5, 0.0, 0.0, NONE])


def test_head_sinks_exceed_the_mean_of_the_others_by_more_than_epsilon():
    mass = torch.tensor([[4.0, 1.0, 1.0], [4.1, 1.0, 1.0], [6.0, 6.0, 0.0]])
    assert diagnostics.head_sinks(mass).tolist() == [[False] * 3, [True, False, False], [False] * 3]
    assert diagnostics.head_sinks(mass, epsilon=2.9).tolist() == [[True, False, False], [True, False, False], [True, True, False]]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_mass_per_query_of_a_causal_model(factor):
    mass = factor * torch.tensor([6.0, 2.0, 1.0])  # seen by 3, 2 and 1 queries: 2, 1 and 1 each; the total is 9
    assert close(diagnostics.per_query(mass), [factor * x for x in (4.5, 2.25, 2.25)])
