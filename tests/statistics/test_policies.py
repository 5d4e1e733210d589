"""Sink policies by hand: what is variable loses weight, what stays does not, and what went is told as it is."""

import pytest
import torch

from structprune.config import SinkSettings
from structprune.statistics.policies import instability, policy_report, policy_weights, removed_weight, survival
from structprune.statistics.sinks import keep_weights, sink_mask

# one window, 4 levels, 4 positions: a sink throughout, one at half the levels, one at a single level, never one
PHI = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.8, 0.0], [1.0, 0.0, 0.0, 0.0]]])


def test_instability_is_the_population_variance_over_the_levels():
    # 0.8 once in four: mean 0.2, variance (3 * 0.04 + 0.36) / 4 = 0.12
    assert torch.allclose(instability(PHI), torch.tensor([[0.0, 0.25, 0.12, 0.0]]))


def test_survival_is_the_share_of_levels_above_one_half():
    assert torch.equal(survival(PHI), torch.tensor([[1.0, 0.5, 0.25, 0.0]]))
    assert torch.equal(survival(torch.full((2, 3), 0.5)), torch.zeros(3))  # one half is no sink


def test_all_takes_phi_and_none_takes_nothing():
    assert torch.equal(policy_weights(PHI, "all"), 1 - PHI)
    assert torch.equal(policy_weights(PHI, "none"), torch.ones_like(PHI))
    assert torch.equal(policy_weights(PHI[0, 2], "all"), 1 - PHI[0, 2])  # one level will do


def test_unstable_spares_what_stays_and_takes_what_moves():
    # 1 - phi * 4 * variance: the one at half the levels loses all there, the one at a single level 0.8 * 0.48
    lost = torch.tensor([[[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.384, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    assert torch.allclose(policy_weights(PHI, "unstable"), 1 - lost)


def test_levels_are_compared_within_a_window_only():
    other = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))  # (N, S, T)
    alone = torch.cat([policy_weights(window[None], "unstable") for window in other])
    assert torch.equal(policy_weights(other, "unstable"), alone)


def test_weights_stay_within_0_and_1():
    phi = torch.tensor([[0.0], [1.0]], dtype=torch.float32)  # 4 x variance is 1: rounding must not take it above
    assert policy_weights(phi, "unstable").tolist() == [[1.0], [0.0]]
    some = policy_weights(torch.rand(50, 3, 7, generator=torch.Generator().manual_seed(1)), "unstable")
    assert some.min() >= 0 and some.max() <= 1


MASS = torch.tensor([[[0.0, 0.0, 0.0, 4.0], [0.0, 0.0, 4.0, 0.0]]])  # mean 1, std sqrt(3)


def test_hard_is_phi_of_0_or_1_for_every_policy():
    hard = {"mask": "hard", "kappa": 1.0}
    assert keep_weights(MASS, SinkSettings(**hard)).tolist() == [[[1, 1, 1, 0], [1, 1, 0, 1]]]
    assert keep_weights(MASS, SinkSettings(policy="unstable", **hard)).tolist() == [[[1, 1, 1, 0], [1, 1, 0, 1]]]
    stays = MASS[:, :1].expand(1, 2, 4)
    assert keep_weights(stays, SinkSettings(policy="unstable", **hard)).tolist() == [[[1, 1, 1, 1]] * 2]
    assert keep_weights(MASS[:, :1].repeat(1, 2, 1), SinkSettings(**hard)).tolist() == [[[1, 1, 1, 0]] * 2]
    assert keep_weights(MASS, SinkSettings(policy="none", **hard)).eq(1).all()


def test_the_threshold_may_be_scale_free_for_every_policy():
    phi = sink_mask(MASS, 0.5, 1.0, scale_free=True)
    assert not torch.allclose(phi, sink_mask(4 * MASS, 0.5, 1.0), atol=1e-3)
    settings = {"alpha": 0.5, "kappa": 1.0, "scale_free": True}
    for policy in ("all", "unstable"):
        assert torch.equal(keep_weights(4 * MASS, SinkSettings(policy=policy, **settings)), policy_weights(phi, policy))


MASKED = torch.tensor([[[False, True, False, True]] * 4])  # (1, 4, 4)


def test_what_was_taken_by_hand():
    report = removed_weight(policy_weights(PHI, "all"), MASKED)  # 4 + 2 + 0.8 of 16 rows
    assert report["share"] == pytest.approx(6.8 / 16)
    assert report["by_level"] == pytest.approx([0.5, 0.5, 0.45, 0.25])
    assert report["by_decile"] == pytest.approx([1.0, 0.5, 0.2, 0.0])  # four positions, so four parts
    assert report["by_kind"] == {"mask": pytest.approx(2 / 8), "text": pytest.approx(4.8 / 8)}
    assert report["of_mask"] == pytest.approx(2 / 6.8)
    assert report["top"] == [[0, 1.0], [1, 0.5], [2, pytest.approx(0.2)]]


def test_a_decile_is_a_tenth_of_the_positions():
    weights = torch.ones(1, 1, 20)
    weights[..., 19] = 0.5
    report = removed_weight(weights, torch.zeros(1, 1, 20, dtype=torch.bool))
    assert report["by_decile"] == pytest.approx([0.0] * 9 + [0.25])
    assert report["by_kind"] == {"mask": None, "text": pytest.approx(0.5 / 20)}


def test_nothing_taken():
    report = removed_weight(torch.ones(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool))
    assert report["share"] == 0 and report["of_mask"] is None and report["top"] == []


def test_the_report_holds_both_policies():
    report = policy_report(PHI, MASKED, "unstable")
    assert report["policy"] == "unstable" and report["windows"] == 1
    assert report["sinks"] == pytest.approx(7 / 16)
    assert report["survival"] == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert report["instability"] == pytest.approx((0.25 + 0.12) / 3)
    assert report["taken"]["all"]["share"] == pytest.approx(6.8 / 16)
    assert report["taken"]["unstable"]["share"] == pytest.approx(2.384 / 16)
    assert "unstable" not in policy_report(PHI[:, :1], MASKED[:, :1], "all")["taken"]  # one level: nothing to compare
