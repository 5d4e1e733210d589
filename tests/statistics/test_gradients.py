"""Sums of gradients: the same however they are cut into passes, in fp32, and no more alive than must be."""

from dataclasses import replace

import pytest
import torch

from structprune.config import SinkSettings
from structprune.models import logits
from structprune.models.adapter import Adapter
from structprune.statistics import gradients
from structprune.statistics.gradients import gradient_sums, recomputes, saved_bytes
from structprune.statistics.rows import scan_rows
from structprune.statistics.scan import Limits, Scan
from structprune.structured.units import block_tensors
from tests.tiny_values import DENSE

MASK, LENGTH, AMPLE = 2047, 12, 10**9


def sums_of(model, calibration, batch=6, budget=AMPLE, arm="masked+sink", **options):
    adapter = Adapter(model)
    sink, limits = SinkSettings(alpha=0.7, kappa=0.5), Limits(batch=batch, budget=budget)
    rows = scan_rows(Scan(adapter, calibration, sink), arm)
    return gradient_sums(Scan(adapter, calibration, sink, limits, **options), rows, linears(adapter))


def linears(adapter):
    return [value for block in adapter.blocks for value in block_tensors(block).values()]


@pytest.mark.parametrize("family", DENSE)
def test_sums_do_not_depend_on_the_cut(tiny_model, calibration, family, monkeypatch):
    model = tiny_model(family)
    whole = sums_of(model, calibration)
    assert all(total.dtype == torch.float32 and total.abs().max() > 0 for total in whole)
    monkeypatch.setattr(logits, "LOGIT_BYTES", 3 * 4 * 2048 * 5)  # five positions at once
    for batch in (1, 4):
        for one, other in zip(whole, sums_of(model, calibration, batch)):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("budget, times", [(AMPLE, 1), (0, 2)])
def test_blocks_are_computed_again_beyond_the_budget_only(tiny_model, calibration, budget, times):
    model, calls = tiny_model(), []
    expected = sums_of(model, calibration, arm="masked")
    model.blocks[1].part("gate").register_forward_hook(lambda module, args, output: calls.append(len(output)))
    sums = sums_of(model, calibration, batch=4, budget=budget, arm="masked")
    assert calls == [4] * times + [2] * times
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-7) for one, other in zip(sums, expected))


def test_the_head_runs_at_masked_positions_a_slice_at_a_time(tiny_model, calibration, monkeypatch):
    model, rows = tiny_model(), []
    model.output_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    monkeypatch.setattr(logits, "LOGIT_BYTES", 3 * 4 * 2048 * 7)
    sums_of(model, calibration, arm="masked")
    masked = int((calibration.noisy_ids == MASK).sum())
    assert rows == [7] * (masked // 7) + [masked % 7]


def test_one_gradient_is_alive_at_a_time(tiny_model, calibration, monkeypatch):
    model, alive, make = tiny_model(), [], gradients._add_to

    def counting(total):
        fold = make(total)

        def count(parameter):
            alive.append(sum(each.grad is not None for each in model.parameters()))
            fold(parameter)

        return count

    monkeypatch.setattr(gradients, "_add_to", counting)
    sums_of(model, calibration, batch=3, arm="masked")
    assert alive == [1] * (2 * len(linears(Adapter(model))))


def test_half_precision_gradients_are_summed_in_fp32(tiny_model, calibration, monkeypatch):
    """Each pass's bf16 gradient, added exactly; bf16 sums would round."""
    added, make = {}, gradients._add_to

    def recording(total):
        fold = make(total)

        def see(parameter):
            assert parameter.grad.dtype == torch.bfloat16
            added.setdefault(id(total), []).append(parameter.grad.clone())
            fold(parameter)

        return see

    monkeypatch.setattr(gradients, "_add_to", recording)
    sums = sums_of(tiny_model().bfloat16(), calibration, batch=2, arm="masked")
    for total in sums:
        parts = added[id(total)]
        assert len(parts) == 3 and torch.equal(total, parts[0].float() + parts[1].float() + parts[2].float())
        assert not torch.equal(total, (parts[0] + parts[1] + parts[2]).float())


@pytest.mark.parametrize("stopped", [False, True])
def test_the_model_is_left_as_it_was(tiny_model, calibration, stopped):
    model = tiny_model()
    frozen, held = model.blocks[0].part("gate").weight, model.blocks[1].part("up").weight
    frozen.requires_grad_(False)
    mine = held.grad = torch.full_like(held, 3.0)
    before = {name: value.requires_grad for name, value in model.named_parameters()}

    def stop(items, title):
        assert title == "gradients"
        yield items[0]
        raise KeyboardInterrupt

    if stopped:
        with pytest.raises(KeyboardInterrupt):
            sums_of(model, calibration, batch=2, arm="masked", track=stop)
    else:
        sums_of(model, calibration, arm="masked")
    assert held.grad is mine and (mine == 3).all()
    assert {name: value.requires_grad for name, value in model.named_parameters()} == before
    assert sum(value.grad is not None for value in model.parameters()) == 1
    assert not any(value._post_accumulate_grad_hooks for value in model.parameters())


def test_rows_without_a_masked_token_add_nothing(tiny_model, calibration):
    model = tiny_model()
    clean = torch.cat((calibration.input_ids[:, None], calibration.noisy_ids[:, 1:]), dim=1)  # (N, S, T)
    one = sums_of(model, replace(calibration, noisy_ids=clean), batch=1, arm="masked")
    two = sums_of(model, replace(calibration, noisy_ids=clean), batch=6, arm="masked")
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-7) for a, b in zip(one, two))
    assert all(not total.any() for total in sums_of(model, replace(calibration, noisy_ids=clean[:, :1].repeat(1, 2, 1)),
                                                    arm="masked"))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", DENSE[:4])  # not of queries that grow: their factor is as wide as one feature
def test_saved_bytes_are_those_autograd_saves(tiny_model, family, dtype):
    model = tiny_model(family).to(dtype)
    adapter, x = Adapter(model), torch.randn(2, LENGTH, 32, dtype=dtype).requires_grad_()  # (B, T, C)
    block, rotary = adapter.blocks[1], model.rotary(LENGTH, "cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in block_tensors(block).values():
        parameter.requires_grad_(True)
    storage = lambda value: value.untyped_storage().data_ptr()  # noqa: E731
    shared, sizes, alive = {storage(each) for each in (*model.parameters(), *rotary)}, {}, []

    def pack(value):
        alive.append(value)
        if storage(value) not in shared:
            sizes[storage(value)] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        block.module(x, rotary)
    assert sum(sizes.values()) == 2 * LENGTH * saved_bytes(block, dtype)
    total = sum(saved_bytes(each, dtype) for each in adapter.blocks)
    assert not recomputes(adapter.blocks, 7, dtype, 7 * total) and recomputes(adapter.blocks, 7, dtype, 7 * total - 1)
