"""Moments of all consumers' inputs: by one forward or two, in batches of any size, equal to plain sums."""

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.adapter import Adapter
from structprune.statistics.moments import consumer_moments, held_input_bytes
from structprune.statistics.rows import arm_rows, measure_mass
from structprune.statistics.scan import Limits, Scan
from tests.tiny_values import DENSE

MASK = 2047
SINK = SinkSettings(alpha=0.7, kappa=0.5)
ARMS = ("clean", "masked", "masked+sink", "clean+sink")


@pytest.fixture
def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 90, (5, 12), generator=generator)
    noisy = ids[:, None].repeat(1, 2, 1)  # (N, S, T)
    noisy[torch.rand(noisy.shape, generator=generator) < 0.5] = MASK
    return Calibration(ids, noisy, torch.full((5, 2), 0.5), {}, held_out=0)


def forwards(adapter: Adapter, run) -> tuple:
    """The result of `run()` and the number of times that the first block was run."""
    count = []
    handle = adapter.blocks[0].module.register_forward_hook(lambda *_: count.append(1))
    try:
        return run(), len(count)
    finally:
        handle.remove()


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("family", DENSE)
@torch.inference_mode()
def test_moments_of_every_arm_equal_plain_sums(tiny_model, calibration, family, arm):
    adapter = Adapter(tiny_model(family))
    measured = consumer_moments(Scan(adapter, calibration, SINK, Limits(windows=2)), arm)
    mass = measure_mass(Scan(adapter, calibration)) if arm.endswith("sink") else None
    rows = arm_rows(calibration, arm, SINK, mass, MASK, adapter.model.layout)
    weight = torch.ones(rows.ids.shape) if rows.weight is None else rows.weight  # (R, T)
    squares = weight.double().flatten() ** 2
    x, context = adapter.model.embedding(rows.ids), adapter.context(rows.ids.shape)
    for block in adapter.blocks:
        for role in ("attention_output", "down"):
            read = block.module.mix(x, *context) if role == "attention_output" else block.module.activate(x)
            x = x + block[role](read)
            flat = read.flatten(0, 1).double()  # (R*T, C)
            mean = squares @ flat / squares.sum()
            assert torch.allclose(measured[block.index, role].mean, mean, atol=1e-5)
            assert torch.allclose(measured[block.index, role].squared_norm, squares @ flat**2, rtol=1e-4)
            assert torch.allclose(
                measured[block.index, role].spread, squares @ (flat - mean) ** 2, rtol=1e-3, atol=1e-6
            )


def test_one_forward_where_the_inputs_fit_and_two_where_not(tiny_model, calibration):
    adapter = Adapter(tiny_model())
    size = held_input_bytes(adapter, 2 * 2 * 12, 4)  # two windows at two levels, fp32
    assert size == 4 * (2 * 2 * 12) * 3 * (32 + 48)
    within, beyond = (Scan(adapter, calibration, SINK, Limits(2, budget)) for budget in (size, size - 1))
    held, once = forwards(adapter, lambda: consumer_moments(within, "masked+sink"))
    again, twice = forwards(adapter, lambda: consumer_moments(beyond, "masked+sink"))
    assert (once, twice) == (3, 6)  # five windows in batches of two
    for key in held:
        for part in ("mean", "spread"):  # attention is computed otherwise where its mass is measured as well
            assert torch.allclose(getattr(held[key], part), getattr(again[key], part), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arm, expected", [("clean", 3), ("masked", 3), ("clean+sink", 6)])
def test_forwards_of_the_other_arms(tiny_model, calibration, arm, expected):
    adapter = Adapter(tiny_model())
    scan = Scan(adapter, calibration, SINK, Limits(windows=2))
    assert forwards(adapter, lambda: consumer_moments(scan, arm))[1] == expected


@pytest.mark.parametrize("arm", ARMS)
def test_batches_of_any_size_give_the_same(tiny_model, calibration, arm):
    adapter = Adapter(tiny_model("dream"))
    one, five = (consumer_moments(Scan(adapter, calibration, SINK, Limits(windows)), arm) for windows in (1, 5))
    for key in one:
        assert torch.allclose(one[key].mean, five[key].mean, atol=1e-5)
        assert torch.allclose(one[key].spread, five[key].spread, rtol=1e-4, atol=1e-6)


def test_sink_weights_change_the_moments(tiny_model, calibration):
    scan = Scan(Adapter(tiny_model()), calibration, SINK)
    plain, weighted = (consumer_moments(scan, arm) for arm in ("masked", "masked+sink"))
    for key in plain:
        assert weighted[key].weight < 0.95 * plain[key].weight
        assert not torch.allclose(weighted[key].mean, plain[key].mean, atol=1e-4)
