"""Statistics of models whose blocks lack attention or MLPs: those of a whole model that computes the same."""

from dataclasses import replace

import pytest
import torch

from structprune.config import SinkSettings
from structprune.models.adapter import Adapter
from structprune.statistics.capture import HeadMeter
from structprune.statistics.gradients import gradient_sums, recomputes, saved_bytes
from structprune.statistics.inputs import InputNorms, block_inputs, block_output
from structprune.statistics.moments import consumer_moments
from structprune.statistics.norms import late_input_bytes, one_shot_norms
from structprune.statistics.residual import ResidualRun, TargetRun
from structprune.statistics.rows import arm_weights, mass_of, scan_rows
from structprune.statistics.scan import Limits, Scan

SINK = SinkSettings(alpha=0.7, kappa=0.5)
KEYS = [(0, "attention"), (1, "attention"), (1, "channels"), (3, "channels")]
INPUTS = [(0, "attention_input"), (0, "mixed"), *((1, name) for name in ("attention_input", "mixed", "mlp_input")),
          (1, "activated"), (3, "mlp_input"), (3, "activated")]  # fmt: skip


@pytest.fixture(params=["llada", "dream"])
def pair(request, gap_pair):
    """Adapters of a model with gaps and of the whole one."""
    return [Adapter(model) for model in gap_pair(request.param)]


def test_they_compute_the_same(pair):
    ids = torch.randint(0, 2000, (2, 9), generator=torch.Generator().manual_seed(0))  # (B, T)
    with torch.no_grad():
        gapped, whole = (adapter.model(ids).logits for adapter in pair)
    assert torch.equal(gapped, whole) and gapped.abs().max() > 0.1


@torch.no_grad()
def heads_mass(whole: Adapter, ids: torch.Tensor) -> torch.Tensor:
    """(b, T) mass of the whole model's first two blocks, the only ones with attention in the other."""
    with HeadMeter().on(whole.cores) as meter:
        whole.model.encode(ids)
    return torch.stack([layer.sum(1) for layer in meter.take()[:2]]).sum(0)


def test_mass_is_that_of_the_layers_with_attention(pair, calibration):
    gapped, whole = pair
    ids = calibration.noisy_ids.flatten(0, 1)  # (R, T)
    assert torch.allclose(mass_of(gapped, ids), heads_mass(whole, ids), rtol=1e-4)
    heads = sum(block.widths.query_heads for block in gapped.blocks)
    assert torch.allclose(mass_of(gapped, ids).sum(1), torch.tensor(float(heads * ids.shape[1])))


@pytest.mark.parametrize("arm", ["clean", "masked"])
@pytest.mark.parametrize("summed, relative", [(True, False), (False, True)])
def test_norms(pair, calibration, arm, summed, relative):
    gapped, whole = (one_shot_norms(Scan(adapter, calibration), arm, summed, relative) for adapter in pair)
    assert set(gapped) == set(INPUTS) and len(whole) == 16
    assert all(torch.allclose(gapped[key], whole[key], rtol=1e-5) for key in INPUTS)


@pytest.mark.parametrize("arm", ["masked+sink", "clean+sink"])
@pytest.mark.parametrize("relative", [False, True])
def test_norms_with_sink_weights(pair, calibration, arm, relative):
    """Also while inputs are held until the mass of the last attention, which is not in the last block."""
    gapped, whole = pair
    noisy = calibration.noisy_ids
    mass = heads_mass(whole, noisy.flatten(0, 1)).view(noisy.shape)  # (N, S, T)
    weight = arm_weights(mass, arm, SINK).flatten(0, 1)  # (R, T)
    ids = (calibration.input_ids[:, None] if arm.startswith("clean") else noisy).flatten(0, 1)  # (R, T)
    expected, x = InputNorms(), whole.model.embedding(ids)  # (R, T, C)
    with torch.no_grad():
        for block in whole.blocks:
            inputs = block_inputs(block, x, whole.model.context(ids.shape, "cpu"))
            for name, read in inputs.read.items():
                expected.add((block.index, name), read, inputs.weight(name, weight, relative))
            x = block_output(block, inputs)
    for budget in (2**30, 0):
        scan = Scan(gapped, calibration, SINK, Limits(batch=4, budget=budget))
        measured = one_shot_norms(scan, arm, False, relative)
        assert set(measured) == set(INPUTS)
        assert all(torch.allclose(measured[key], expected.norms()[key], rtol=1e-4) for key in INPUTS), budget


def test_held_inputs_are_those_that_there_are(gap_pair):
    """fp32: the stream, and what attention outputs read, of three blocks; sums over groups of other inputs."""
    share = 19 / 96  # 1/8 alone, 7/8 in groups of 12
    needed = 4 * (3 * 32 + 2 * 32) + 4 * (32 + 32 + 32 + 48) * share
    assert late_input_bytes(Adapter(gap_pair("llada")[0]), 1000) == int(1000 * needed)


@pytest.mark.parametrize("arm", ["clean", "masked"])
def test_moments(pair, calibration, arm):
    gapped, whole = (consumer_moments(Scan(adapter, calibration), arm) for adapter in pair)
    assert set(gapped) == {(0, "attention_output"), (1, "attention_output"), (1, "down"), (3, "down")}
    for key, value in gapped.items():
        assert torch.allclose(value.mean, whole[key].mean, atol=1e-6)
        assert torch.allclose(value.spread, whole[key].spread, rtol=1e-4)


def test_moments_with_sink_weights(pair, calibration):
    scans = [Scan(pair[0], calibration, SINK, Limits(budget=budget)) for budget in (2**30, 0)]
    held, again = (consumer_moments(scan, "masked+sink") for scan in scans)
    assert set(held) == set(again) and len(held) == 4
    for key in held:
        assert torch.allclose(held[key].spread, again[key].spread, rtol=1e-5)
        assert not torch.allclose(held[key].weight, torch.tensor(72.0).double())  # of all rows without weights


@pytest.mark.parametrize("budget", [2**33, 0])
def test_gradients(pair, calibration, budget):
    """The same for what both have, whether blocks are computed again or not."""
    sums = []
    for adapter in pair:
        scan = Scan(adapter, calibration, limits=Limits(budget=budget))
        assert recomputes(adapter.blocks, 24, torch.float32, budget) == (budget == 0)
        names = [f"{block.names[role]}.weight" for block in pair[0].blocks for role in block.names]
        parameters = [adapter.model.get_parameter(name) for name in names]
        sums.append(gradient_sums(scan, scan_rows(scan, "masked"), parameters))
    assert len(sums[0]) == 4 + 7 + 3
    assert all(torch.allclose(ours, theirs, atol=1e-6) and ours.abs().max() > 1e-5 for ours, theirs in zip(*sums))


def test_saved_activations_of_a_block_are_those_of_its_halves(pair):
    first, second, third, last = (saved_bytes(block, torch.float32) for block in pair[0].blocks)
    whole = [saved_bytes(block, torch.float32) for block in pair[1].blocks]
    assert first + last == second == whole[0] and third == 0


@pytest.mark.parametrize("kind_of_run", [ResidualRun, TargetRun])
@pytest.mark.parametrize("budget", [0, 2**30])
@torch.no_grad()
def test_runs_consumer_by_consumer(pair, kind_of_run, budget):
    ids = torch.randint(0, 2000, (5, 7), generator=torch.Generator().manual_seed(0))  # (R, T)
    gapped, whole = (kind_of_run(adapter, ids, 2, budget) for adapter in pair)
    for index in range(4):
        for kind in ("attention", "channels"):
            if (index, kind) in KEYS:
                for rows in gapped.slices():
                    assert torch.allclose(gapped.read((index, kind), rows), whole.read((index, kind), rows), atol=1e-6)
                gapped.advance((index, kind))
            whole.advance((index, kind))
    states = [run.states(slice(0, 5)) for run in (gapped, whole)]
    assert torch.allclose(*states, atol=1e-6)


def test_a_last_block_with_nothing(tiny_model, calibration):
    """Blocks after the last attention may have nothing at all."""
    nothing = {"n_heads": 0, "n_kv_heads": 0, "mlp_hidden_size": 0}
    short, long = tiny_model(n_layers=2), tiny_model(n_layers=3, per_layer_config={"2": nothing})
    scans = [Scan(Adapter(model), calibration, SINK) for model in (short, long)]
    for arm in ("masked", "masked+sink"):
        ours, theirs = (one_shot_norms(replace(scan, limits=Limits(batch=3)), arm) for scan in scans)
        assert ours.keys() == theirs.keys() and all(torch.allclose(ours[key], theirs[key], rtol=1e-5) for key in ours)
