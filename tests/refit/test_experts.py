"""Refits of experts: the least-squares solution on the tokens that each sees, by hand."""

from dataclasses import replace

import pytest
import torch

from structprune.config import ReconstructSettings, SinkSettings
from structprune.models.adapter import Adapter
from structprune.models.experts_structprune import tokens_of
from structprune.refit.reconstruct import Reconstructor
from structprune.statistics.scan import Limits, Scan
from structprune.structured.plan import Plan, identity_plan
from structprune.structured.surgery import apply_plan

SIZE, EXPERTS = 16, 6


@pytest.fixture
def scan(tiny_model, calibration) -> Scan:
    adapter = Adapter(tiny_model("llada-moe"))
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 90, (14, 12), generator=generator)  # (N, T)
    noisy = ids[:, None].repeat(1, 2, 1)  # (N, S, T)
    noisy[torch.rand(noisy.shape, generator=generator) < 0.5] = 2047
    many = replace(calibration, input_ids=ids, noisy_ids=noisy, mask_probability=torch.full((14, 2), 0.5), held_out=4)
    return Scan(adapter, many, SinkSettings(), Limits(batch=2, budget=2**33))


def first_block_cut(adapter: Adapter, experts: tuple[int, ...]) -> Plan:
    """Of the first block's mixture every second channel goes, and the experts that are not named."""
    plan = identity_plan(adapter)
    channels = tuple(e * SIZE + channel for e in experts for channel in range(0, SIZE, 2))
    return replace(plan, blocks=(replace(plan.blocks[0], channels=channels, experts=experts), *plan.blocks[1:]))


@pytest.mark.parametrize("experts", [tuple(range(EXPERTS)), (0, 2, 3, 5)])
@torch.no_grad()
def test_the_first_mixture_by_hand(scan, experts):
    """Its stream lost nothing yet, so that targets are the dense experts' outputs, by the shares of those that stay."""
    dense, damping = scan.adapter, 0.01
    plan = first_block_cut(dense, experts)
    settings = ReconstructSettings(damping=(damping,), producers=False, relative=False, visible=1.0)
    small = apply_plan(dense.model, plan)
    before = {e: small.blocks[0].part(f"down.{number}").weight.double().clone() for number, e in enumerate(experts)}
    fits = Reconstructor(scan, settings).refit(small, plan.remaining, experts=plan.experts)
    noisy = scan.calibration.noisy_ids[: scan.calibration.windows - 4].flatten(0, 1)  # (R, T) fitted rows
    x = dense.model.embedding(noisy)
    x = dense.blocks[0].module.add_attention(x, *dense.context(noisy.shape))  # (R, T, C)
    h = dense.blocks[0].module.part("mlp_norm")(x).flatten(0, 1)  # (n, C)
    shares, chosen = small.blocks[0].part("router")(h)  # (n, k) each
    changed = 0
    for number, expert in enumerate(experts):
        (fit,) = [each for each in fits if (each.block, each.kind) == (0, f"down.{expert}")]
        weight = small.blocks[0].part(f"down.{number}").weight
        if fit.damping == float("inf"):
            assert torch.equal(weight.double(), before[expert])
            continue
        tokens, place = tokens_of(chosen, number)  # (m,) each
        omega = shares[tokens, place].double()[:, None]  # (m, 1)
        rows = dense.blocks[0].mixture.gated(str(expert), h[tokens]).double()  # (m, M)
        kept, target = rows[:, ::2], rows @ dense.blocks[0][f"down.{expert}"].weight.double().T  # (m, K), (m, O)
        gram = (kept * omega).T @ (kept * omega)  # (K, K)
        ridge = gram + damping * gram.diagonal().mean() * torch.eye(len(gram)).double()  # (K, K)
        right = (target * omega).T @ (kept * omega) - before[expert] @ gram  # (O, K)
        expected = before[expert] + torch.linalg.solve(ridge, right.T).T  # (O, K)
        assert torch.allclose(weight.double(), expected, rtol=1e-3, atol=1e-4)
        assert 0 < fit.error < 1
        changed += 1
    assert changed >= 2


@torch.no_grad()
def test_nothing_changes_where_nothing_was_cut(scan):
    plan = identity_plan(scan.adapter)
    small = apply_plan(scan.adapter.model, plan)
    fits = Reconstructor(scan, ReconstructSettings(relative=True)).refit(small, plan.remaining, experts=plan.experts)
    assert sum(fit.kind.startswith("down.") for fit in fits) == 3 * EXPERTS
    assert all(fit.damping == float("inf") for fit in fits)


@torch.no_grad()
def test_what_the_stream_lacks_is_shared_by_the_experts_of_a_token(scan):
    """With the second block's experts whole and the first block's output gone, a refit lowers what is lacking."""
    dense = scan.adapter
    plan = identity_plan(dense)
    blocks = (replace(plan.blocks[0], channels=()), *plan.blocks[1:])
    plan, errors = replace(plan, blocks=blocks), {}
    noisy = scan.calibration.noisy_ids[-4:].flatten(0, 1)  # (R, T) held out
    expected = dense.model.encode(noisy)  # (R, T, C)
    for stream in (0.0, 1.0):
        small = apply_plan(dense.model, plan)
        settings = ReconstructSettings(producers=False, stream=stream)
        Reconstructor(scan, settings).refit(small, plan.remaining, experts=plan.experts)
        errors[stream] = (small.encode(noisy) - expected).pow(2).mean().item()
    plain = (apply_plan(dense.model, plan).encode(noisy) - expected).pow(2).mean().item()
    assert errors[1.0] < errors[0.0] < plain
