"""The four arms: which rows each runs, and how much each row counts."""

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.adapter import Adapter
from structprune.models.layers_structprune import Layout
from structprune.statistics.rows import arm_rows, measure_mass, needs_sinks
from structprune.statistics.scan import Limits, Scan
from structprune.statistics.sinks import attention_mass, keep_weights

MASK = 2047


@pytest.fixture
def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 90, (3, 12), generator=generator)
    ids[0, 4] = MASK  # text may hold the mask token itself: such a position is not masked
    p = torch.tensor([0.2, 0.5, 0.9]).expand(3, 3)  # (N, S)
    noisy = ids[:, None].repeat(1, 3, 1)  # (N, S, T)
    noisy[torch.rand(noisy.shape, generator=generator) < p[..., None]] = MASK
    return Calibration(ids, noisy, p.contiguous(), {}, held_out=0)


SINK = SinkSettings(alpha=0.7, kappa=0.5)
MASS = torch.rand(3, 3, 12, generator=torch.Generator().manual_seed(1)) * 8  # (N, S, T)


def test_clean_rows(calibration):
    rows = arm_rows(calibration, "clean", SINK, None, MASK, Layout())
    assert torch.equal(rows.ids, calibration.input_ids)
    assert rows.weight is None and rows.copies == 1 and not rows.masked.any()


def test_masked_rows(calibration):
    rows = arm_rows(calibration, "masked", SINK, None, MASK, Layout())
    assert torch.equal(rows.ids, calibration.noisy_ids.flatten(0, 1)) and rows.copies == 3 and rows.weight is None
    assert torch.equal(rows.ids[4], calibration.noisy_ids[1, 1])  # window-major, then level
    assert torch.equal(rows.masked, rows.ids != calibration.input_ids.repeat_interleave(3, dim=0))
    assert not rows.masked[:3, 4].any()


def test_masked_sink_rows_weigh_each_level_by_its_own_mass(calibration):
    rows = arm_rows(calibration, "masked+sink", SINK, MASS, MASK, Layout())
    assert torch.equal(rows.ids, arm_rows(calibration, "masked", SINK, None, MASK, Layout()).ids)
    for window in range(3):
        for level in range(3):
            mass = MASS[window, level]
            threshold = mass.mean() + 0.5 * (mass - mass.mean()).pow(2).mean().sqrt()
            expected = 1 - 1 / (1 + torch.exp(-0.7 * (mass - threshold)))  # (T,)
            assert torch.allclose(rows.weight[3 * window + level], expected, atol=1e-6)


def test_clean_sink_rows_weigh_by_the_mean_over_levels(calibration):
    rows = arm_rows(calibration, "clean+sink", SINK, MASS, MASK, Layout())
    assert torch.equal(rows.ids, calibration.input_ids) and rows.copies == 1
    expected = torch.stack([keep_weights(MASS[:, level], SINK) for level in range(3)]).sum(0) / 3  # (N, T)
    assert torch.allclose(rows.weight, expected, atol=1e-6)
    # the mean of the levels' weights is not the weight of their mean mass
    assert not torch.allclose(rows.weight, keep_weights(MASS.mean(1), SINK), atol=1e-3)


def test_which_arms_need_sinks():
    arms = ("clean", "masked", "masked+sink", "clean+sink", None)
    assert [needs_sinks(arm, SinkSettings()) for arm in arms] == [False, False, True, True, False]
    assert [needs_sinks(arm, SinkSettings(policy="unstable")) for arm in arms] == [False, False, True, True, False]
    assert not any(needs_sinks(arm, SinkSettings(policy="none")) for arm in arms)


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
@torch.inference_mode()
def test_mass_is_measured_on_the_noisy_copies(tiny_model, calibration, family):
    adapter = Adapter(tiny_model(family))
    mass, single = (measure_mass(Scan(adapter, calibration, limits=Limits(batch=batch))) for batch in (6, 1))
    assert torch.equal(mass, single) or torch.allclose(mass, single, rtol=1e-5)
    total = torch.zeros(12)

    def add(module, args):
        total.add_(attention_mass(args[0], args[1])[0])

    handles = [block.core.register_forward_pre_hook(add) for block in adapter.blocks]
    adapter.model.encode(calibration.noisy_ids[2, 1][None])
    for handle in handles:
        handle.remove()
    assert torch.allclose(mass[2, 1], total, rtol=1e-5)
