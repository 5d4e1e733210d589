"""Norms and Gram matrices of experts' inputs: over the tokens that each sees, with the weights of just those."""

import pytest
import torch
import torch.nn.functional as F

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.masking.walk import Use, Walk, WalkPlan
from structprune.models.adapter import Adapter
from structprune.statistics.norms import holds_inputs, one_shot_norms
from structprune.statistics.rows import arm_weights, mass_of
from structprune.statistics.scan import Limits, Scan

SINK = SinkSettings(alpha=0.7, kappa=0.5)


@pytest.fixture
def adapter(tiny_model) -> Adapter:
    return Adapter(tiny_model("llada-moe"))


@torch.no_grad()
def rows_by_hand(adapter: Adapter, ids: torch.Tensor, index: int) -> dict[str, list]:
    """Of one sequence (T,): input of an expert -> (position, its row (C,), RMS of the stream) of each token it sees."""
    x = adapter.model.embedding(ids[None])  # (1, T, C)
    context = adapter.context(ids[None].shape)
    for block in adapter.blocks[:index]:
        x = block.module(x, *context)
    block = adapter.blocks[index]
    x = block.module.add_attention(x, *context)[0]  # (T, C)
    rows: dict[str, list] = {name: [] for name in block.readers if "." in name}
    for position, (stream, h) in enumerate(zip(x, block.module.part("mlp_norm")(x))):
        scale = stream.double().pow(2).mean().sqrt()
        for expert in (block.module.part("router").weight @ h).topk(2).indices.tolist():
            gate, up = (block[f"{role}.{expert}"].weight for role in ("gate", "up"))
            rows[f"mlp_input.{expert}"].append((position, h.double(), 1.0))  # it adds to no stream itself
            rows[f"activated.{expert}"].append((position, (F.silu(gate @ h) * (up @ h)).double(), scale))
    return rows


def weights_of(adapter: Adapter, noisy: torch.Tensor) -> torch.Tensor:
    """ω of every noisy sequence (R, T)."""
    mass = torch.cat([mass_of(adapter, copy[None]) for copy in noisy])  # (R, T)
    return arm_weights(mass[:, None], "masked+sink", SINK)[:, 0].double()


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@torch.no_grad()
def test_norms_by_hand(adapter, calibration: Calibration, summed, relative):
    scan = Scan(adapter, calibration, SINK, Limits(batch=2, budget=2**33))
    result = one_shot_norms(scan, "masked+sink", summed, relative)
    noisy = calibration.noisy_ids.flatten(0, 1)  # (R, T)
    weights = weights_of(adapter, noisy)  # (R, T)
    assert weights.max() - weights.min() > 0.3
    squares: dict[str, list] = {}
    for copy, omega in zip(noisy, weights):
        for name, rows in rows_by_hand(adapter, copy, 1).items():
            own = [(omega[place] * row / (scale if relative else 1.0)) ** 2 for place, row, scale in rows]
            squares.setdefault(name, []).append(sum(own, torch.zeros(adapter.blocks[1][_reader(name)].in_features)))
    assert len(squares) == 12
    for name, parts in squares.items():
        expected = sum(part.sqrt() for part in parts) if summed else sum(parts).sqrt()  # (C,)
        assert torch.allclose(result[1, name], expected.double(), rtol=1e-4, atol=1e-6), name


def _reader(name: str) -> str:
    base, _, expert = name.partition(".")
    return f"{'gate' if base == 'mlp_input' else 'down'}.{expert}"


@torch.no_grad()
def test_gram_matrices_of_a_walk_by_hand(adapter, calibration: Calibration):
    noisy = calibration.noisy_ids.flatten(0, 1)  # (R, T)
    weights = weights_of(adapter, noisy).float()  # (R, T)
    plan = WalkPlan(noisy, Use(slice(0, len(noisy)), weights), on_dense=True, target_dense=False)
    walk = Walk(adapter, adapter, plan, Limits(batch=2, budget=2**33))
    walk.measure(0)
    grams = walk.measure(1)
    expected = {name: torch.zeros_like(gram).double() for name, gram in grams.items() if "." in name}
    for copy, omega in zip(noisy, weights):
        for name, rows in rows_by_hand(adapter, copy, 1).items():
            for place, row, _ in rows:
                expected[name] += omega[place].double() ** 2 * torch.outer(row, row)
    assert len(expected) == 12 and any(gram.any() for gram in expected.values())
    for name, gram in expected.items():
        assert torch.allclose(grams[name].double(), gram, rtol=1e-4, atol=1e-5), name


def test_inputs_do_not_wait_for_their_weights(adapter, tiny_model):
    """Sums over groups of rows are of all tokens; an expert's are not."""
    assert not holds_inputs(adapter, 1, 2**60) and holds_inputs(Adapter(tiny_model("dream")), 1, 2**60)
