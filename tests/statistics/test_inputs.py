"""Norms of the dense model's inputs against plain forward passes, and how many passes they take."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.adapter import Adapter
from structprune.statistics import norms
from structprune.statistics.inputs import InputNorms, block_inputs, inputs_of_rows
from structprune.statistics.norms import late_input_bytes, one_shot_norms
from structprune.statistics.scan import Limits, Scan

MASK, WINDOWS, LEVELS, LENGTH = 2047, 3, 2, 10
ARMS = ("clean", "masked", "masked+sink", "clean+sink")
SINK = SinkSettings(alpha=0.7, kappa=0.5)
FIRST = {  # input -> a linear that reads it
    "llada": {"attention_input": "k_proj", "mixed": "attn_out", "mlp_input": "up_proj", "activated": "ff_out"},
    "dream": {"attention_input": "self_attn.v_proj", "mixed": "self_attn.o_proj", "mlp_input": "mlp.up_proj",
              "activated": "mlp.down_proj"},
}  # fmt: skip
NORMS = {"llada": ("attn_norm", "ff_norm"), "dream": ("input_layernorm", "post_attention_layernorm")}


@pytest.fixture
def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 90, (WINDOWS, LENGTH), generator=generator)
    noisy = ids[:, None].repeat(1, LEVELS, 1)  # (N, S, T)
    noisy[torch.rand(noisy.shape, generator=generator) < 0.5] = MASK
    return Calibration(ids, noisy, torch.full((WINDOWS, LEVELS), 0.5), {}, held_out=0)


def scan(adapter: Adapter, calibration: Calibration, batch: int = 1, budget: int = 2**33) -> Scan:
    return Scan(adapter, calibration, SINK, Limits(batch=batch, budget=budget))


@torch.no_grad()
def observe(model, family: str, ids: torch.Tensor):
    """One sequence (T,): inputs by (block, input), streams by (block, input), and its attention mass (T,)."""
    read, streams, mass, handles = {}, {}, torch.zeros(LENGTH).double(), []

    def note(store, key, module, given):
        store[key] = given[0][0].double()

    def add(module, given):
        query, key = given[0][0].double(), given[1][0].double()  # (H, T, D), (K, T, D)
        for head in range(len(query)):
            shared = key[head // (len(query) // len(key))]  # (T, D)
            mass.add_(torch.softmax(query[head] @ shared.T / math.sqrt(query.shape[-1]), dim=-1).sum(0))

    for index, block in enumerate(model.blocks):
        for name, path in FIRST[family].items():
            handles.append(block.get_submodule(path).register_forward_pre_hook(partial(note, read, (index, name))))
        for name, path in zip(("mixed", "activated"), NORMS[family]):
            handles.append(block.get_submodule(path).register_forward_pre_hook(partial(note, streams, (index, name))))
        core = block.get_submodule(block.roles["core"])
        handles.append(core.register_forward_pre_hook(add))
    model(ids[None])
    for handle in handles:
        handle.remove()
    return read, streams, mass


def row_weight(mass: torch.Tensor) -> torch.Tensor:
    threshold = mass.mean() + SINK.kappa * (mass - mass.mean()).pow(2).mean().sqrt()
    return 1 - 1 / (1 + torch.exp(-SINK.alpha * (mass - threshold)))  # (T,)


def naive(model, family: str, calibration: Calibration, arm: str, summed: bool, relative: bool) -> dict:
    """Norms by (block, input), one sequence at a time."""
    totals: dict = {}
    for clean, copies in zip(calibration.input_ids, calibration.noisy_ids):
        noisy = [observe(model, family, copy) for copy in copies]
        weights = [row_weight(mass) for _, _, mass in noisy]
        if arm.startswith("clean"):
            noisy, weights = [observe(model, family, clean)], [torch.stack(weights).mean(0)]
        for (read, streams, _), weight in zip(noisy, weights, strict=True):
            for key, x in read.items():
                rows = x * weight[:, None] if arm.endswith("sink") else x  # (T, C)
                if relative and key in streams:
                    rows = rows / streams[key].pow(2).mean(1, keepdim=True).sqrt()
                totals.setdefault(key, []).append(rows.pow(2).sum(0))
    stacked = {key: torch.stack(parts) for key, parts in totals.items()}  # (R, C)
    return {key: part.sqrt().sum(0) if summed else part.sum(0).sqrt() for key, part in stacked.items()}


@pytest.mark.parametrize("family, changes", [("llada", {}), ("llada", {"n_kv_heads": 2}), ("dream", {})])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("summed, relative", [(True, False), (False, True)])
def test_norms_equal_one_sequence_at_a_time(tiny_model, calibration, family, changes, arm, summed, relative):
    model = tiny_model(family, **changes)
    expected = naive(model, family, calibration, arm, summed, relative)
    assert len(expected) == 3 * 4
    for batch, budget in ((1, 2**30), (4, 2**30), (4, 0)):
        measured = one_shot_norms(scan(Adapter(model), calibration, batch, budget), arm, summed, relative)
        assert set(measured) == set(expected)
        for key, norm in measured.items():
            assert norm.dtype == torch.float64 and torch.allclose(norm, expected[key], rtol=1e-4), (key, batch)


def test_every_choice_has_an_effect(tiny_model, calibration):
    one, key = scan(Adapter(tiny_model("llada")), calibration), (1, "activated")
    choices = [(arm, summed, relative) for arm in ARMS for summed in (True, False) for relative in (True, False)]
    measured = [one_shot_norms(one, arm, *rest)[key] for arm, *rest in choices]
    assert not any(torch.allclose(a, b, rtol=1e-3) for i, a in enumerate(measured) for b in measured[:i])
    hard, soft = (replace(one, sink=SinkSettings(mask=mask)) for mask in ("hard", "soft"))
    hard, soft = (one_shot_norms(each, "masked+sink")[key] for each in (hard, soft))
    assert not torch.allclose(hard, soft, rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("relative", [False, True])
def test_held_and_recomputed_inputs_give_equal_numbers(tiny_model, calibration, batch, relative):
    adapter = Adapter(tiny_model("dream"))
    scans = (scan(adapter, calibration, batch, budget) for budget in (2**30, 0))
    held, again = (one_shot_norms(each, "masked+sink", True, relative) for each in scans)
    assert max((held[key] / again[key] - 1).abs().max().item() for key in held) < 5e-6  # `SAME`; 1e-6 without it


@pytest.mark.parametrize("family, relative", [("llada", False), ("dream", True)])
@pytest.mark.parametrize("kappa, share", [(1.5, (0.05, 0.6)), (9.0, (0, 0)), (-9.0, (0, 0))])
def test_only_groups_of_other_weights_are_made_again(tiny_model, family, relative, kappa, share, monkeypatch):
    """Hard weights: some, none or all rows weigh 0; 30 rows, so that the last group of 4 is cut short.

    Groups of rows that weigh the same count as a whole, whatever they weigh.
    """
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randint(0, 90, (2, 3, 30), generator=generator)
    calibration = Calibration(noisy[:, 0], noisy, None, {}, held_out=0)
    adapter, counts = Adapter(tiny_model(family)), []

    def noted(block, x, mixed):
        counts.append(x.shape[1])
        return inputs_of_rows(block, x, mixed)

    monkeypatch.setattr(norms, "inputs_of_rows", noted)
    sink = SinkSettings(mask="hard").model_copy(update={"kappa": kappa})  # below 0 no configuration goes
    ample, none = (replace(scan(adapter, calibration, 4, budget), sink=sink) for budget in (2**30, 0))
    held = one_shot_norms(ample, "masked+sink", True, relative)
    assert share[0] <= sum(counts) / (2 * 6 * 30) <= share[1]  # two blocks, six sequences
    again = one_shot_norms(none, "masked+sink", True, relative)
    assert all(torch.allclose(held[key], again[key], rtol=1e-6) for key in held) and len(held) == 12


def passes(adapter, calibration, arm, batch, budget, relative=False) -> tuple[int, int]:
    """Sequences embedded, and those that reach the last block's down projection."""
    counts = [0, 0]

    def count(place, module, given):
        counts[place] += len(given[0])

    watched = (adapter.model.embedding, adapter.blocks[-1]["down"])
    handles = [module.register_forward_pre_hook(partial(count, place)) for place, module in enumerate(watched)]
    one_shot_norms(scan(adapter, calibration, batch, budget), arm, relative=relative)
    for handle in handles:
        handle.remove()
    return tuple(counts)


@pytest.mark.parametrize("batch", [1, 4])
def test_one_forward_pass_a_sequence_where_inputs_fit(tiny_model, calibration, batch):
    adapter = Adapter(tiny_model("llada"))
    noisy = WINDOWS * LEVELS
    assert passes(adapter, calibration, "clean", batch, 0) == (WINDOWS, WINDOWS)
    assert passes(adapter, calibration, "masked", batch, 0, relative=True) == (noisy, noisy)
    assert passes(adapter, calibration, "masked+sink", batch, 2**30, relative=True) == (noisy, 0)  # the last is not run
    # the masses of the noisy copies first
    assert passes(adapter, calibration, "clean+sink", batch, 0) == (WINDOWS + noisy, WINDOWS)


def test_inputs_are_held_up_to_the_budget(tiny_model, calibration):
    adapter = Adapter(tiny_model("llada"))
    # a batch of 2, fp32, two blocks: what they and their attention outputs read, and sums over groups of 12 rows
    needed = int(2 * LENGTH * 2 * (4 * (32 + 32) + 4 * (32 + 32 + 48) * 19 / 96))  # 1/8 alone, 7/8 in groups of 12
    assert late_input_bytes(adapter, 2 * LENGTH) == needed
    noisy = WINDOWS * LEVELS
    assert passes(adapter, calibration, "masked+sink", 2, needed) == (noisy, 0)
    # again, and the masses first, which need no more than the last attention
    assert passes(adapter, calibration, "masked+sink", 2, needed - 1) == (2 * noisy, noisy)


@pytest.mark.parametrize("blocks", [1, 2])
def test_shallow_models_know_their_weights_in_time(tiny_model, calibration, blocks):
    model = tiny_model("llada", n_layers=blocks)
    measured = one_shot_norms(scan(Adapter(model), calibration, 3), "masked+sink", True, True)
    expected = naive(model, "llada", calibration, "masked+sink", True, True)
    assert set(measured) == set(expected)
    assert all(torch.allclose(measured[key], expected[key], rtol=1e-4) for key in expected)


def test_no_hook_stays(tiny_model, calibration):
    adapter = Adapter(tiny_model("llada"))
    for arm in ARMS:
        one_shot_norms(scan(adapter, calibration), arm, relative=True)
    assert not any(module._forward_pre_hooks for module in adapter.model.modules())


def test_norms_by_hand():
    x = torch.tensor([[[3.0, 0.0], [4.0, 1.0]], [[0.0, 2.0], [12.0, 2.0]]])  # (2, 2, 2)
    weight = torch.tensor([[1.0, 1.0], [1.0, 0.5]])
    joint, summed = InputNorms(), InputNorms(summed=True)
    for norms_of in (joint, summed):
        norms_of.add("a", x[:1], None)
        norms_of.add("a", x[1:], weight[1:])
        norms_of.add("b", x, weight)
    # squares: 9 + 16 and 1 of the first, 36 and 4 + 1 of the second
    for key in ("a", "b"):
        assert joint.norms()[key].tolist() == pytest.approx([61**0.5, 6**0.5])
        assert summed.norms()[key].tolist() == pytest.approx([5 + 6, 1 + 5**0.5])


@torch.no_grad()
def test_a_block_hands_over_what_its_linears_read(tiny_model):
    adapter = Adapter(tiny_model("dream"))
    block, model = adapter.blocks[1], adapter.model
    x = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(0))
    context = model.context((2, LENGTH), "cpu")
    inputs = block_inputs(block, x, context)
    assert set(inputs.read) == set(FIRST["dream"]) and set(inputs.stream) == {"mixed", "activated"}
    assert torch.equal(inputs.stream["mixed"], x)
    middle = x + block["attention_output"](inputs.read["mixed"])
    assert torch.allclose(inputs.stream["activated"], middle)
    assert torch.allclose(middle + block["down"](inputs.read["activated"]), block.module(x, *context), atol=1e-5)
    assert torch.allclose(inputs.read["attention_input"], block.module.part("attention_norm")(x))
    assert torch.allclose(inputs.read["mlp_input"], block.module.part("mlp_norm")(middle), atol=1e-6)
    weight = torch.rand(2, LENGTH)
    scaled = weight / middle.pow(2).mean(-1).sqrt()
    assert torch.allclose(inputs.weight("activated", weight, True), scaled)
    assert inputs.weight("activated", weight, False) is weight and inputs.weight("mlp_input", weight, True) is weight
