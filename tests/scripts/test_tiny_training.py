"""Schedules, noise, loss and optimizer of scripts/tools/tiny_training.py against hand-computed values."""

import math

import pytest
import torch
from torch import nn

MASK_ID = 2047


@pytest.fixture
def maths(scripts):
    return scripts("tiny_training")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("step", "progress", "expected"),
    [(0, 0.0, 0.01), (49, 0.01, 0.5), (99, 0.02, 1.0), (500, 0.4, 1.0), (600, 0.7, 0.5), (900, 1.0, 0.0)],
)
def test_learning_rate_rises_over_a_hundred_steps_and_falls_over_the_last_60_percent(maths, step, progress, expected):
    assert maths.rate_factor(step, progress) == pytest.approx(expected)


def test_rates_masks_and_windows_follow_the_recipe(maths):
    assert [maths.mask_rates(progress) for progress in (0.0, 0.249, 0.25, 1.0)] == [(0.1, 0.4)] * 2 + [(0.03, 1.0)] * 2
    shapes = [maths.batch_shape(step, 24, 128) for step in range(8)]
    assert shapes == [(24, 128), (24, 128), (24, 128), (12, 256)] * 2
    assert maths.batch_shape(3, 1, 8) == (1, 16)


def test_windows_are_runs_of_the_corpus_and_reach_its_end(maths):
    windows = maths.draw_windows(torch.arange(10, dtype=torch.int32), 200, 8, generator())
    assert windows.dtype == torch.int64
    assert torch.equal(windows - windows[:, :1], torch.arange(8).expand(200, 8))
    assert set(windows[:, 0].tolist()) == {0, 1, 2}


def test_mask_rates_are_stratified_over_the_batch(maths):
    masked = maths.draw_masks(4, 20_000, (0.2, 1.0), generator())
    rates = sorted(masked.double().mean(dim=1).tolist())
    steps = [b - a for a, b in zip(rates, rates[1:])]
    assert 0.2 <= rates[0] < 0.41 and rates[3] <= 1.0
    assert steps == pytest.approx([0.2] * 3, abs=0.015)  # (1.0 - 0.2) / 4 apart


def test_every_sequence_has_a_masked_token(maths):
    masked = maths.draw_masks(500, 4, (0.0, 0.01), generator())
    assert masked.sum(dim=1).min() == 1
    assert masked.sum() < 520  # and hardly ever more than the one


def test_loss_averages_within_sequences_before_it_averages_over_them(maths, tiny_model):
    model = tiny_model("llada")
    ids = torch.randint(MASK_ID, (2, 8), generator=generator())
    masked = torch.zeros(2, 8, dtype=torch.bool)
    masked[0, 3] = masked[1, 1] = masked[1, 4] = masked[1, 6] = True
    logits = model(ids.masked_fill(masked, MASK_ID)).logits.log_softmax(-1)  # (B, T, V)
    nats = [-logits[row, place, ids[row, place]] for row, place in masked.nonzero().tolist()]
    expected = (nats[0] + (nats[1] + nats[2] + nats[3]) / 3) / 2
    assert maths.masked_loss(model, ids, masked).item() == pytest.approx(expected.item(), rel=1e-5)


def quintic(value: float) -> float:
    """Five iterations on one singular value."""
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_newton_schulz_maps_singular_values_and_keeps_singular_vectors(maths, shape):
    short = min(shape)
    left = torch.linalg.qr(torch.randn(2, shape[0], short, generator=generator()).double())[0]  # (N, rows, short)
    right = torch.linalg.qr(torch.randn(2, shape[1], short, generator=generator(1)).double())[0]  # (N, columns, short)
    values = torch.tensor([4.0, 3.0, 0.5, 0.1][:short]).double()
    expected = torch.tensor([quintic(v.item()) for v in values / values.norm()]).double()
    result = maths.newton_schulz(left * values @ right.transpose(1, 2))
    assert torch.allclose(result, left * expected @ right.transpose(1, 2), atol=1e-5)
    assert quintic(1.0) == pytest.approx(0.7, abs=0.2) and (expected - 1).abs().max() < 0.35


def test_muon_takes_nesterov_steps_of_a_set_size(maths):
    """A 1 x 2 matrix has one singular value, so its update is its direction times quintic(1)."""
    weight, lr = nn.Parameter(torch.zeros(1, 2)), 0.1
    optimizer = maths.Muon([weight], lr, momentum=0.5)
    size = lr * 0.2 * math.sqrt(2) * quintic(1.0)
    weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer.step()
    assert torch.allclose(weight.detach(), -size * torch.tensor([[0.6, 0.8]]), atol=1e-6)
    before, weight.grad = weight.detach().clone(), torch.tensor([[5.0, 0.0]])
    optimizer.step()  # average 0.5 · (3, 4) + (5, 0) = (6.5, 2); direction (5, 0) + 0.5 · average = (8.25, 1)
    direction = torch.tensor([[8.25, 1.0]]) / math.hypot(8.25, 1.0)
    assert torch.allclose(weight.detach() - before, -size * direction, atol=1e-6)


def test_matrices_of_one_shape_are_orthogonalised_each_for_itself(maths):
    gradients = torch.randn(2, 3, 4, generator=generator())
    together = [nn.Parameter(torch.zeros(3, 4)) for _ in range(2)]
    alone = [nn.Parameter(torch.zeros(3, 4)) for _ in range(2)]
    for parameters in (together, alone):
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.clone()
    maths.Muon(together, 0.1).step()
    for parameter in alone:
        maths.Muon([parameter], 0.1).step()
    for one, other in zip(together, alone):
        assert torch.allclose(one, other, atol=1e-6)


def test_muon_has_the_blocks_matrices_and_adam_the_rest(maths, tiny_model):
    model = tiny_model("llada")
    muon, adam = maths.make_optimizers(model, 0.007, 0.003)
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert len(inside) == 3 * 7 and all(".blocks." in name and "norm" not in name for name in inside)
    rest = {names[id(p)] for p in adam.param_groups[0]["params"]}
    assert len(rest) == 3 + 2 * 3 and rest | inside == set(names.values())
    maths.set_rates([muon, adam], 0.5)
    maths.set_rates([muon, adam], 0.1)  # of the peak, not of the rate before
    assert (muon.param_groups[0]["lr"], adam.param_groups[0]["lr"]) == (pytest.approx(7e-4), pytest.approx(3e-4))
