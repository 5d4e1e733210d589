"""Hooks see what they should and are gone afterwards, also after an exception."""

import pytest
import torch

from structprune.models.adapter import Adapter
from structprune.statistics import capture
from structprune.statistics.capture import MassMeter, consumers, watch_inputs


def hooks_left(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


IDS = torch.arange(10).view(2, 5)


@torch.inference_mode()
def test_watch_inputs_sees_every_consumer_once(tiny_model):
    adapter = Adapter(tiny_model())
    inputs = {}
    with watch_inputs(consumers(adapter.blocks), inputs.__setitem__):
        adapter.model.encode(IDS)
    assert set(inputs) == {(index, role) for index in range(3) for role in ("attention_output", "down")}
    assert inputs[1, "attention_output"].shape == (2, 5, 32) and inputs[1, "down"].shape == (2, 5, 48)
    state = adapter.model.embedding(IDS)  # (B, T, C)
    expected = adapter.blocks[0].module.mix(state, adapter.model.rotary(5, state.device))
    assert torch.allclose(inputs[0, "attention_output"], expected, atol=1e-6)
    assert hooks_left(adapter.model) == 0


@torch.inference_mode()
def test_meter_sums_layers_and_starts_anew(tiny_model):
    adapter = Adapter(tiny_model())
    meter = MassMeter()
    with meter.on(adapter.cores):
        adapter.model.encode(IDS)
        first = meter.take()
        adapter.model.encode(IDS)
        second = meter.take()
    assert torch.equal(first, second)  # nothing of the first pass is left in the second
    assert torch.allclose(first.sum(1), torch.full((2,), 3.0 * 4 * 5))  # layers x heads x queries
    assert hooks_left(adapter.model) == 0


def test_hooks_are_removed_on_exceptions(tiny_model):
    adapter = Adapter(tiny_model())

    def fail(key, x):
        raise RuntimeError("inside a hook")

    watched = watch_inputs(consumers(adapter.blocks), fail)
    with pytest.raises(RuntimeError, match="inside a hook"), torch.inference_mode(), watched:
        assert hooks_left(adapter.model) == 6
        adapter.model.encode(IDS)
    assert hooks_left(adapter.model) == 0
    with pytest.raises(KeyboardInterrupt), MassMeter().on(adapter.cores):
        assert all("forward" in vars(block.core) for block in adapter.blocks)
        raise KeyboardInterrupt
    assert not any("forward" in vars(block.core) for block in adapter.blocks)


@torch.inference_mode()
@pytest.mark.parametrize("one_pass", [0, 1024])
def test_a_meter_changes_no_output(tiny_model, monkeypatch, one_pass):
    monkeypatch.setattr(capture, "ONE_PASS", one_pass)
    for family in ("llada", "dream"):
        adapter = Adapter(tiny_model(family))
        plain = adapter.model.encode(IDS)
        with MassMeter().on(adapter.cores) as meter:
            assert torch.allclose(adapter.model.encode(IDS), plain, atol=1e-5)
        heads = adapter.blocks[0].widths.query_heads
        assert torch.allclose(meter.take().sum(1), torch.full((2,), 3.0 * heads * 5))  # layers x heads x queries
