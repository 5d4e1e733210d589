"""The refit of q, k, v, gate and up, and targets between the dense model's and the layer's own, by plain algebra."""

from dataclasses import replace

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import ReconstructSettings
from structprune.models.adapter import CONSUMER, Adapter
from structprune.refit.products import UNCHANGED
from structprune.refit.reconstruct import Reconstructor
from structprune.statistics.scan import Limits, Scan
from structprune.structured.plan import BlockPlan, Plan
from structprune.structured.surgery import apply_plan

MASK, LENGTH, DAMPING = 2047, 12, 0.05
ORDER = ["attention", "gate", "up", "channels", "query", "key", "value", "attention", "gate", "up", "channels"]


@pytest.fixture
def calibration() -> Calibration:
    """The held-out windows are among those that are fitted, so that refits are gains."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 90, (40, LENGTH), generator=generator)
    noisy = ids[:, None].clone()  # (N, 1, T)
    noisy[torch.rand(noisy.shape, generator=generator) < 0.5] = MASK
    ids, noisy = (torch.cat((each, each[:8])) for each in (ids, noisy))
    return Calibration(ids, noisy, torch.full((48, 1), 0.5), {}, held_out=8)


def narrow_plan(adapter: Adapter) -> Plan:
    """The first two blocks keep half of their channels, and the same query heads of every KV group."""
    heads, kv = ((0, 3), (0, 3)) if adapter.family.name == "llada" else ((0, 2, 3, 4), (0, 1))
    blocks = [BlockPlan(heads, kv, tuple(range(index, 48, 2))) for index in (0, 1)]
    widths = adapter.blocks[2].widths
    whole = (tuple(range(size)) for size in (widths.query_heads, widths.kv_heads, widths.channels))
    return Plan(adapter.family.name, (*blocks, BlockPlan(*whole)))


def refit(model, plan, calibration, budget=2**30, **settings):
    small = apply_plan(model, plan)
    scan = Scan(Adapter(model), calibration, limits=Limits(budget=budget))
    chosen = ReconstructSettings(damping=(DAMPING,), **{"producers": False, "stream": 0} | settings)
    return small, Reconstructor(scan, chosen).refit(small, plan.remaining)


def streams(model, blocks: int, ids) -> torch.Tensor:
    """The residual stream (R, T, C) before block `blocks`."""
    x, rotary = model.embedding(ids), model.rotary(LENGTH, "cpu")
    for block in model.blocks[:blocks]:
        x = block(x, rotary)
    return x


def ridge(inputs, targets, start) -> torch.Tensor:
    """The weight (O, K) fp64 nearest to both: (rows, K), (rows, O), (O, K)."""
    penalty = (DAMPING * inputs.pow(2).sum(0).mean()).sqrt()
    left = torch.cat((inputs, penalty * torch.eye(inputs.shape[1]).double()))
    return torch.linalg.lstsq(left, torch.cat((targets, penalty * start.T))).solution.T


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
@torch.no_grad()
def test_queries_keys_and_values_give_what_they_gave_in_the_dense_model(tiny_model, calibration, family):
    model = tiny_model(family)
    plan = narrow_plan(Adapter(model))
    cut = Adapter(apply_plan(model, plan)).blocks[1]
    small, fits = refit(model, plan, calibration, producers=True)
    assert [fit.kind for fit in fits][:11] == ORDER
    ids, held_out = calibration.fit.noisy_ids.flatten(0, 1), calibration.check
    masked = held_out.noisy_ids == MASK  # (N, 1, T)
    dense_block, block = Adapter(model).blocks[1], Adapter(small).blocks[1]
    norms = [each.module.part("attention_norm") for each in (dense_block, block)]

    def sides(tokens):
        dense, pruned = (
            norm(streams(each, 1, tokens)).flatten(0, 1).double() for norm, each in zip(norms, (model, small))
        )
        return dense, pruned

    (dense, pruned), (dense_check, pruned_check) = sides(ids), sides(held_out.noisy_ids.flatten(0, 1))
    dense_check, pruned_check = dense_check[masked.flatten()], pruned_check[masked.flatten()]
    for role in ("query", "key", "value"):
        start = cut[role].weight.double()  # (O, C)
        new = ridge(pruned, dense @ start.T, start)
        errors = [(pruned_check @ weight.T - dense_check @ start.T).pow(2).sum().item() for weight in (start, new)]
        fit = next(fit for fit in fits if (fit.block, fit.kind) == (1, role))
        assert (fit.damping != UNCHANGED) == (errors[1] < errors[0])
        assert fit.error == pytest.approx(min(errors) / errors[0], rel=1e-3)
        expected = new if errors[1] < errors[0] else start
        assert torch.allclose(block[role].weight, expected.float(), atol=1e-4)
        bias = cut[role].bias
        assert bias is None or torch.equal(block[role].bias, bias)
    assert any(fit.kind in ("query", "key", "value") and fit.damping != UNCHANGED for fit in fits)


@torch.no_grad()
def test_the_same_without_memory_for_targets_and_in_a_second_walk(tiny_model, calibration):
    model = tiny_model()
    plan = narrow_plan(Adapter(model))
    first, _ = refit(model, plan, calibration, producers=True)
    tight, _ = refit(model, plan, calibration, budget=0, producers=True)
    again = apply_plan(model, plan)
    shared = Reconstructor(Scan(Adapter(model), calibration), ReconstructSettings(damping=(DAMPING,), stream=0))
    shared.refit(apply_plan(model, plan))
    shared.refit(again)
    logits = [each(calibration.noisy_ids[0]).logits for each in (first, tight, again)]
    assert torch.allclose(logits[0], logits[1], atol=1e-3) and torch.allclose(logits[0], logits[2], atol=1e-5)


@torch.no_grad()
def test_a_missing_half_is_passed_and_what_follows_is_refitted(tiny_model, calibration):
    model = tiny_model()
    plan = narrow_plan(Adapter(model))
    first, second, last = plan.blocks
    gaps = replace(plan, blocks=(replace(first, query_heads=(), kv_heads=()), BlockPlan((), (), ()), last))
    _, fits = refit(model, gaps, calibration, producers=True)
    kinds = [(fit.block, fit.kind) for fit in fits]
    roles = ("query", "key", "value", "attention", "gate", "up", "channels")
    assert kinds == [*((0, role) for role in roles[4:]), *((2, role) for role in roles)]
    assert any(fit.kind == "gate" and fit.error < 1 for fit in fits)


@torch.no_grad()
def test_mixed_targets_lie_between_the_two_at_the_given_share(tiny_model, calibration):
    """In the first MLP all three refits read the same rows, and the refitted weight is linear in its target."""
    model = tiny_model()
    plan = narrow_plan(Adapter(model))
    whole = Adapter(model).blocks[0].widths
    attention = {"query_heads": tuple(range(whole.query_heads)), "kv_heads": tuple(range(whole.kv_heads))}
    first = replace(plan.blocks[0], query_heads=attention["query_heads"][:-1], kv_heads=attention["kv_heads"][:-1])
    plan = replace(plan, blocks=(first, *plan.blocks[1:]))
    settings = {
        "dense": {"target": "dense"}, "layer": {"target": "layer"}, "mixed": {"target": "mixed", "dense_share": 0.25},
    }  # fmt: skip
    downs = {}
    for name, chosen in settings.items():
        small, fits = refit(model, plan, calibration, **chosen)
        assert fits[1].damping != UNCHANGED
        # on the first attention's inputs, which are equal, all targets are the same
        downs[name] = Adapter(small).blocks[0]["down"].weight
    assert not torch.allclose(downs["dense"], downs["layer"], atol=1e-3)
    assert torch.allclose(downs["mixed"], 0.25 * downs["dense"] + 0.75 * downs["layer"], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_consumer_makes_up_for_a_share_of_what_the_stream_lacks(tiny_model, calibration, share):
    """In the first MLP, behind an attention that lost heads, by plain algebra on both models' states."""
    model = tiny_model()
    plan = narrow_plan(Adapter(model))
    cut = Adapter(apply_plan(model, plan)).blocks[0]["down"].weight.double()  # (O, K)
    small, fits = refit(model, plan, calibration, stream=share, relative=False)
    ids = calibration.fit.noisy_ids.flatten(0, 1)
    sides = []
    for each in (model, small):
        block, x, context = Adapter(each).blocks[0], streams(each, 0, ids), each.context(ids.shape, "cpu")
        x = x + block[CONSUMER["attention"]](block.consumed("attention", x, context))  # (R, T, C)
        sides.append((x, block.consumed("channels", x, context)))
    (dense, dense_inputs), (pruned, inputs) = sides
    output = Adapter(model).blocks[0]["down"](dense_inputs)  # (R, T, C)
    lacking = dense - pruned
    assert lacking.abs().max() > 0.01 and fits[1].damping != UNCHANGED
    target = (output + share * lacking).flatten(0, 1).double()
    expected = ridge(inputs.flatten(0, 1).double(), target, cut)
    assert torch.allclose(Adapter(small).blocks[0]["down"].weight, expected.float(), atol=1e-4)


@torch.no_grad()
def test_missing_halves_are_made_up_for_too(tiny_model, calibration):
    """Where an attention is gone, all of its output is lacking."""
    model = tiny_model()
    plan = narrow_plan(Adapter(model))
    gap = replace(plan, blocks=(replace(plan.blocks[0], query_heads=(), kv_heads=()), *plan.blocks[1:]))
    ids = calibration.fit.noisy_ids.flatten(0, 1)
    errors = []
    for share in (0.0, 1.0):
        small, _ = refit(model, gap, calibration, stream=share, relative=False)
        errors.append((streams(small, 1, ids) - streams(model, 1, ids)).pow(2).sum().item())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
@torch.no_grad()
def test_the_head_reads_what_the_dense_head_read(tiny_model, calibration, family):
    """W·A, with A the ridge from pruned to dense inputs at the positions that predict masked tokens."""
    model = tiny_model(family)
    plan = narrow_plan(Adapter(model))
    plain, _ = refit(model, plan, calibration)
    small, fits = refit(model, plan, calibration, head=True)
    assert (fits[-1].block, fits[-1].kind, fits[-1].damping) == (3, "head", DAMPING) and fits[-1].error < 1
    ids, clean = calibration.fit.noisy_ids.flatten(0, 1), calibration.fit.input_ids
    rows, tokens = ((ids == MASK) & (clean != MASK)).nonzero(as_tuple=True)
    places = sorted({(row, max(0, token - (family == "dream"))) for row, token in zip(rows.tolist(), tokens.tolist())})
    at = tuple(torch.tensor(places).T)
    inputs, targets = (each.final_norm(streams(each, 3, ids))[at].double() for each in (plain, model))
    best = ridge(inputs, targets, torch.eye(32).double())
    assert torch.allclose(small.output_head.weight.double(), model.output_head.weight.double() @ best, atol=1e-4)
    assert torch.equal(plain.output_head.weight, model.output_head.weight)


@torch.no_grad()
def test_a_candidate_has_its_consumers_refitted_alone(tiny_model, calibration):
    """As without `producers`, so that many plans can be compared in less time."""
    model = tiny_model()
    plan = narrow_plan(Adapter(model))
    expected, fits = refit(model, plan, calibration, stream=1)
    candidate = apply_plan(model, plan)
    settings = ReconstructSettings(damping=(DAMPING,))
    reconstructor = Reconstructor(Scan(Adapter(model), calibration), settings)
    assert reconstructor.refit(candidate, plan.remaining, producers=False) == fits
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in candidate.state_dict().items())
