"""Mixtures of experts cut exactly: channels of every expert, and whole experts with their rows of the router."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from structprune import load_model, prune
from structprune.config import Config
from structprune.errors import UserError
from structprune.models.adapter import Adapter, ExpertWidths
from structprune.models.experts_structprune import tokens_of
from structprune.runs.inspect import inspect_checkpoint
from structprune.statistics.experts import expert_shares
from structprune.statistics.scan import Limits, Scan
from structprune.structured.paths import RemovalPath
from structprune.structured.plan import Plan, identity_plan, make_plan
from structprune.structured.ranking import joined
from structprune.structured.sizes import block_size, forward_macs
from structprune.structured.surgery import apply_plan
from tests.structured.mixtures import IDS, SIZE, SMALL, drawn_channels

EXPERTS = 6


def random_plan(adapter: Adapter, seed: int) -> Plan:
    """Some heads, some experts, and as many channels of each of these."""
    draw, blocks = random.Random(seed), []
    for block in identity_plan(adapter).blocks:
        experts = sorted(draw.sample(range(EXPERTS), draw.randint(2, EXPERTS)))
        channels = drawn_channels(draw, experts)
        heads = tuple(sorted(draw.sample(range(4), draw.randint(1, 4))))
        blocks.append(replace(block, query_heads=heads, kv_heads=heads, channels=channels, experts=tuple(experts)))
    return Plan(adapter.family.name, tuple(blocks))


@torch.no_grad()
def reference(model, plan: Plan):
    """The dense model that neither reads what goes nor sends tokens to experts that go."""
    dense = copy.deepcopy(model)
    for block, kept in zip(Adapter(dense).blocks, plan.blocks):
        for head in set(range(4)) - set(kept.query_heads):
            block["attention_output"].weight[:, head * 8 : head * 8 + 8] = 0
        for unit in set(range(EXPERTS * SIZE)) - set(kept.channels):
            block[f"down.{unit // SIZE}"].weight[:, unit % SIZE] = 0
        gone = torch.tensor([expert not in kept.experts for expert in range(EXPERTS)])
        router = block.module.part("router")

        def forward(rows, router=router, gone=gone):
            shares = (rows @ router.weight.T).masked_fill(gone, -torch.inf).softmax(-1)
            return shares.topk(2)

        router.forward = forward
    return dense


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_random_plans_cut_exactly(tiny_model, seed):
    model = tiny_model("llada-moe")
    plan = random_plan(Adapter(model), seed)
    small = apply_plan(model, plan)
    for block, kept in zip(Adapter(small).blocks, plan.blocks):
        count = len(kept.channels) // len(kept.experts)
        heads = len(kept.query_heads)
        assert block.widths == ExpertWidths(heads, heads, count, experts=len(kept.experts), shared=0)
    assert (small(IDS).logits - reference(model, plan)(IDS).logits).abs().max() <= 1e-5
    assert (small(IDS).logits - model(IDS).logits).abs().max() > 1e-3


@torch.no_grad()
def test_experts_that_no_token_has_a_share_of_go_without_a_trace(tiny_model):
    model = tiny_model("llada-moe")
    blocks = list(identity_plan(Adapter(model)).blocks)
    for index, block in enumerate(Adapter(model).blocks):
        norm, router = block.module.part("mlp_norm").weight, block.module.part("router").weight  # (C,), (E, C)
        norm[0] = 0.0
        block.module.part("mlp_norm").register_forward_hook(
            lambda module, args, h: h.index_fill(-1, torch.tensor(0), 1.0)
        )
        router[[1, 4], 0] = -1000.0  # of a feature that is 1 at every token
        channels = tuple(unit for unit in blocks[index].channels if unit // SIZE not in (1, 4))
        blocks[index] = replace(blocks[index], experts=(0, 2, 3, 5), channels=channels)
    expected = model(IDS).logits
    small = apply_plan(model, Plan("llada-moe", tuple(blocks)))
    for block in small.blocks:
        block.part("mlp_norm").register_forward_hook(lambda module, args, h: h.index_fill(-1, torch.tensor(0), 1.0))
    assert (small(IDS).logits - expected).abs().max() <= 1e-5
    assert small.num_parameters() < model.num_parameters()


def test_a_whole_mixture_goes(tiny_model):
    model = tiny_model("llada-moe")
    plan = identity_plan(Adapter(model))
    blocks = (plan.blocks[0], replace(plan.blocks[1], channels=()), plan.blocks[2])
    with torch.no_grad():
        small = apply_plan(model, replace(plan, blocks=blocks))
        dense = copy.deepcopy(model)
        dense.blocks[1].add_mlp = lambda x: x
        assert (small(IDS).logits - dense(IDS).logits).abs().max() <= 1e-5


def test_a_step_takes_the_next_channel_of_every_expert(tiny_model):
    adapter = Adapter(tiny_model("llada-moe"))
    orders = [random.Random(expert).sample(range(SIZE), SIZE) for expert in range(EXPERTS)]
    cost = torch.arange(float(SIZE)).double()  # (M,)
    own = {
        (1, f"channels.{e}"): RemovalPath(tuple((c,) for c in order), cost * (e + 1)) for e, order in enumerate(orders)
    }
    heads = RemovalPath(((1,), (0,)), cost[:2])
    paths = joined(own | {(1, "attention"): heads}, adapter)
    assert set(paths) == {(1, "attention"), (1, "channels")} and paths[1, "attention"] is heads
    path = paths[1, "channels"]
    assert path.steps[2] == tuple(e * SIZE + order[2] for e, order in enumerate(orders))
    assert torch.equal(path.cost, cost * 21)  # 1 + 2 + ... + 6
    experts = RemovalPath(tuple((e,) for e in (4, 2, 0, 1, 3, 5)), torch.zeros(6).double())
    plan = make_plan(adapter, paths | {(1, "experts"): experts}, {(1, "channels"): 3, (1, "experts"): 2}, "query_heads")
    kept = plan.blocks[1]
    assert kept.experts == (0, 1, 3, 5) and len(kept.channels) == 4 * 13
    assert kept.of_expert(3, SIZE) == tuple(sorted(set(range(SIZE)) - set(orders[3][:3]))) and not kept.of_expert(
        4, SIZE
    )


@torch.no_grad()
def test_what_an_expert_adds_by_hand(tiny_model, calibration):
    adapter = Adapter(tiny_model("llada-moe"))
    scan = Scan(adapter, calibration, None, Limits(batch=2, budget=2**33))
    shares = expert_shares(scan, "masked")
    noisy, block = calibration.noisy_ids.flatten(0, 1), adapter.blocks[0]  # (R, T)
    x = block.module.add_attention(adapter.model.embedding(noisy), *adapter.context(noisy.shape))  # (R, T, C)
    h = block.module.part("mlp_norm")(x).flatten(0, 1)  # (n, C)
    weights, chosen = block.module.part("router")(h)  # (n, k) each
    for expert in range(EXPERTS):
        tokens, place = tokens_of(chosen, expert)
        output = block.mixture.expert(str(expert), h[tokens]) * weights[tokens, place, None]  # (m, C)
        assert shares[0][expert].item() == pytest.approx(output.double().pow(2).sum().item(), rel=1e-4)


def test_sizes_of_a_mixture(tiny_model):
    adapter = Adapter(tiny_model("llada-moe"))
    size, two_gone = (block_size(adapter.blocks[0], "query_heads", experts) for experts in (0, 2))
    expert, attention = 3 * 32 * SIZE, 4 * 32 * 32
    assert size.total == two_gone.total == attention + EXPERTS * expert
    assert (size.step["channels"], two_gone.step["channels"]) == (EXPERTS * 3 * 32, 4 * 3 * 32)
    assert (two_gone.gone, two_gone.whole["channels"]) == (2 * expert, 4 * expert)
    scores = 2 * 4 * 8 * 10
    linears = 3 * (attention + 2 * expert)  # two experts of a token, in three blocks
    assert forward_macs(adapter, 10) == 10 * (linears + 2048 * 32 + 3 * scores)


@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude", "taylor", "fluctuation"])
@pytest.mark.parametrize("experts", [0, 2])
def test_a_run_meets_its_ratio(tiny_checkpoint, text_path, score, experts):
    model = load_model(tiny_checkpoint("llada-moe"))
    values = SMALL | {"structured.score": score, "structured.experts": experts, "calibration.source": str(text_path)}
    result = prune(model, Config.load(overrides=values | {"structured.ratio": 0.5}))
    assert abs(result.report["ratio"] - 0.5) < 0.03
    assert [block.widths.experts for block in Adapter(result.model).blocks] == [EXPERTS - experts] * 3
    kinds = {fit["kind"] for fit in result.report["refit"]}
    assert {"attention", "query", "key", "value"} < kinds and sum(kind.startswith("down.") for kind in kinds) >= 4
    with torch.no_grad():
        expected = apply_plan(model, result.plan)(IDS).logits
        assert result.report["held_out_nelbo"]["kept"] == "refit" or torch.equal(result.model(IDS).logits, expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"structured.experts": 5}, "structured.experts = 5 leaves a token too few to choose from: give 0 to 4"),
        ({"structured.experts": 3}, "takes a share of 0.3462, more than ratio 0.3: lower it"),
        ({"search.enabled": True}, "search.enabled = true does not know the experts of llada-moe"),
        ({"reconstruct.weighting": "gradient"}, "reconstruct.weighting = gradient does not know experts"),
        ({"reconstruct.constant": True}, "need biases, which experts lack"),
    ],
)
def test_what_a_mixture_rules_out(tiny_checkpoint, text_path, changes, said):
    values = SMALL | {"calibration.source": str(text_path), "structured.ratio": 0.3}
    with pytest.raises(UserError, match=said):
        prune(load_model(tiny_checkpoint("llada-moe")), Config.load(overrides=values | changes))


def test_experts_of_a_model_without_any(tiny_checkpoint):
    with pytest.raises(UserError, match="structured.experts = 1, but no block to prune has experts"):
        prune(load_model(tiny_checkpoint("llada")), Config.load(overrides={"structured.experts": 1}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": tuple(range(EXPERTS * SIZE - 1))}, "unequal numbers of channels"),
        ({"experts": (0, 1, 2)}, "channels of experts that go"),
        ({"experts": (0,), "channels": tuple(range(SIZE))}, "keeps 1 experts, of which a token gets 2"),
        ({"experts": (0, 1, 9)}, "experts names 9, but the model has 6"),
        ({"channels": (96,)}, "channels names 96, but the model has 96"),
    ],
)
def test_plans_that_do_not_fit(tiny_model, changes, said):
    adapter = Adapter(tiny_model("llada-moe"))
    plan = identity_plan(adapter)
    with pytest.raises(UserError, match=said):
        replace(plan, blocks=(plan.blocks[0], replace(plan.blocks[1], **changes), plan.blocks[2])).check(adapter)


def test_a_plan_keeps_its_experts_in_a_file(tiny_model, tmp_path):
    plan = random_plan(Adapter(tiny_model("llada-moe")), 3)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert '"experts"' not in identity_plan(Adapter(tiny_model("llada"))).to_json()


def test_the_public_shape_at_half_its_size(published_config):
    """LLaDA-MoE-7B-A1B, from the values of its config.json alone."""
    values = {"structured.ratio": 0.5, "structured.experts": 16, "structured.allocation": "uniform"}
    result = inspect_checkpoint(published_config("llada-moe"), Config.load(overrides=values | {"structured.split": 0}))
    assert result["parameters"]["before"] == 7_356_880_896
    assert result["blocks"][15]["before"]["experts"] == 64 and result["blocks"][15]["after"]["experts"] == 48
    assert result["blocks"][0]["after"]["channels"] == 640 and result["choices"][0]["ratio"] == pytest.approx(0.51)
