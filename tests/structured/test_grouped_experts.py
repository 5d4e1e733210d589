"""Experts in groups beside shared ones, behind a plain block (LLaDA2): cut exactly, as many of every group."""

import copy
import json
import random
from dataclasses import replace

import pytest
import torch
import transformers

from structprune import load_model, prune
from structprune.config import Config
from structprune.errors import UserError
from structprune.models.adapter import Adapter, ExpertWidths
from structprune.runs.checkpoints import prune_checkpoint
from structprune.runs.inspect import inspect_checkpoint
from structprune.runs.resolve import at_ratio, resolve_structured
from structprune.runs.work import Work
from structprune.structured.paths import even_path
from structprune.structured.plan import Plan, identity_plan
from structprune.structured.sizes import block_size
from structprune.structured.surgery import apply_plan
from tests.models.alike import assert_alike
from tests.structured.mixtures import IDS, SIZE, SMALL, drawn_channels

EXPERTS, GROUPS, HEADS = 8, 2, 4
CHOICES = [((0, 1), (0,)), ((0, 2), (0, 1)), ((1, 3), (0, 1)), ((0, 1, 2, 3), (0, 1)), ((2, 3), (1,))]  # of heads


def random_plan(adapter: Adapter, seed: int) -> Plan:
    """Some heads of both KV heads or one of these, as many experts of each group, and channels of all that stays."""
    draw, blocks = random.Random(seed), []
    for block in identity_plan(adapter).blocks:
        heads = draw.choice(CHOICES)
        block = replace(block, query_heads=heads[0], kv_heads=heads[1])
        if not block.experts:
            channels = tuple(sorted(draw.sample(range(48), draw.randint(1, 48))))
            blocks.append(replace(block, channels=channels))
            continue
        each = draw.randint(2, EXPERTS // GROUPS)
        half = EXPERTS // GROUPS
        experts = [group * half + e for group in range(GROUPS) for e in sorted(draw.sample(range(half), each))]
        channels = drawn_channels(draw, experts)
        shared = tuple(sorted(draw.sample(range(SIZE), draw.randint(0, SIZE))))
        blocks.append(replace(block, channels=channels, experts=tuple(experts), shared=shared))
    return Plan(adapter.family.name, tuple(blocks))


@torch.no_grad()
def reference(model, plan: Plan):
    """The dense model that neither reads what goes nor sends tokens to experts that go."""
    dense = copy.deepcopy(model)
    for block, kept in zip(Adapter(dense).blocks, plan.blocks):
        for head in set(range(HEADS)) - set(kept.query_heads):
            block["attention_output"].weight[:, head * 8 : head * 8 + 8] = 0
        if not block.mixture:
            block["down"].weight[:, sorted(set(range(48)) - set(kept.channels))] = 0
            continue
        for unit in set(range(EXPERTS * SIZE)) - set(kept.channels):
            block[f"down.{unit // SIZE}"].weight[:, unit % SIZE] = 0
        block["down.shared"].weight[:, sorted(set(range(SIZE)) - set(kept.shared))] = 0
        gone = torch.tensor([expert not in kept.experts for expert in range(EXPERTS)])

        def forward(rows, router=block.mixture.router, gone=gone):
            scores = (rows @ router.weight.T).sigmoid()
            biased = (scores + router.expert_bias).masked_fill(gone, -torch.inf)
            one, other = (half.topk(2).values.sum(-1) for half in biased.chunk(2, dim=-1))
            open_half = torch.where(one > other, 0, 1)[:, None]  # the best of two groups
            chosen = biased.masked_fill(torch.arange(EXPERTS) // 4 != open_half, -torch.inf).topk(2).indices
            weights = scores.gather(1, chosen)
            return 2.5 * weights / weights.sum(1, keepdim=True), chosen

        block.mixture.router.forward = forward
    return dense


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_random_plans_cut_exactly(tiny_model, seed):
    model = tiny_model("llada2")
    plan = random_plan(Adapter(model), seed)
    small = apply_plan(model, plan)
    for block, kept in zip(Adapter(small).blocks, plan.blocks):
        heads, experts = (len(kept.query_heads), len(kept.kv_heads)), len(kept.experts)
        channels = len(kept.channels) // max(1, experts)
        assert block.widths == ExpertWidths(*heads, channels, experts=experts, shared=len(kept.shared))
    assert (small(IDS).logits - reference(model, plan)(IDS).logits).abs().max() <= 1e-5
    assert (small(IDS).logits - model(IDS).logits).abs().max() > 1e-3
    assert small.get_parameter("model.layers.1.mlp.gate.expert_bias").shape == (len(plan.blocks[1].experts),)


def test_a_path_takes_from_every_group_in_turn():
    path = even_path(torch.tensor([3.0, 1.0, 2.0, 9.0, 7.0, 8.0]), 2)
    assert [unit for (unit,) in path.steps] == [1, 4, 2, 5, 0, 3]
    assert path.cost.tolist() == [1, 7, 2, 8, 3, 9]


def test_sizes_beside_shared_experts(tiny_model):
    plain, mixture = (block_size(block, "query_heads", 2, 4) for block in Adapter(tiny_model("llada2")).blocks[:2])
    attention, expert = 32 * 8 * (4 + 2 + 2 + 4), 3 * 32 * SIZE
    assert (plain.total, plain.gone, plain.step["channels"], plain.experts) == (attention + 3 * 32 * 48, 0, 96, 0)
    assert mixture.total == attention + (EXPERTS + 1) * expert
    assert mixture.gone == 2 * expert + 4 * 3 * 32 and mixture.step["channels"] == 6 * 3 * 32


@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude", "taylor"])
def test_a_run_meets_its_ratio(tiny_checkpoint, text_path, score):
    model = load_model(tiny_checkpoint("llada2"))
    values = SMALL | {"structured.score": score, "structured.experts": 2, "structured.shared": 5}
    values |= {"calibration.source": str(text_path), "structured.ratio": 0.5}
    result = prune(model, Config.load(overrides=values))
    assert abs(result.report["ratio"] - 0.5) < 0.03
    widths = [block.widths for block in Adapter(result.model).blocks]
    assert [(width.experts, width.shared) for width in widths] == [(0, 0), (6, 11), (6, 11)]
    for kept in result.plan.blocks[1:]:
        assert sum(expert < 4 for expert in kept.experts) == 3 and len(kept.shared) == 11
    kinds = {fit["kind"] for fit in result.report["refit"]}
    assert {"attention", "channels", "down.shared", "query"} <= kinds and sum("down." in kind for kind in kinds) >= 5


def test_what_all_tokens_go_through_is_refitted_to_its_dense_output(tiny_checkpoint, text_path):
    """With half its channels gone and nothing else, the refit brings the model nearer to the dense one."""
    model = load_model(tiny_checkpoint("llada2"))
    plan = identity_plan(Adapter(model))
    blocks = [replace(block, shared=tuple(range(0, SIZE, 2)) if block.experts else ()) for block in plan.blocks]
    values = SMALL | {"calibration.windows": 12, "calibration.source": str(text_path)}
    result = prune(model, Config.load(overrides=values), plan=replace(plan, blocks=tuple(blocks)))
    fits = [fit for fit in result.report["refit"] if fit["kind"] == "down.shared"]
    assert [fit["block"] for fit in fits] == [1, 2] and all(fit["error"] < 0.95 for fit in fits)


@torch.no_grad()
def test_an_even_cut_loads_in_both_layouts_without_structprune(tiny_checkpoint, text_path, tmp_path):
    """The family's own keys: a plain first block, and shared experts as wide as a number of others."""
    values = SMALL | {"structured.ratio": 0.4, "structured.allocation": "uniform", "structured.split": 1}
    values |= {"structured.experts": 2, "structured.score": "wanda", "calibration.source": str(text_path)}
    values |= {"structured.round_to": 2}
    dense = load_model(tiny_checkpoint("llada2"))
    choices = inspect_checkpoint(dense.source.directory, Config.load(overrides=values))
    channels = choices["blocks"][1]["after"]["channels"]
    values |= {"structured.shared": SIZE - channels, "export.compat": "official"}
    result = prune(dense, Config.load(overrides=values))
    expected = result.model(IDS).logits
    result.save(tmp_path / "official")
    written = json.loads((tmp_path / "official" / "config.json").read_text())
    widths = [block.widths for block in Adapter(result.model).blocks]
    assert written["moe_intermediate_size"] == widths[1].channels == widths[1].shared < SIZE
    assert written["intermediate_size"] == widths[0].channels < 48 and written["num_experts"] == 6
    assert written["first_k_dense_replace"] == written["num_shared_experts"] == 1
    assert written["num_attention_heads"] == 2 and "per_layer_config" not in written
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "official", trust_remote_code=True)
    assert (again(IDS).logits - expected).abs().max() < 1e-5
    assert_alike(load_model(tmp_path / "official"), result.model, IDS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"structured.experts": 3}, "as many of each of the 2 groups of experts: give a multiple of 2 up to 4"),
        ({"structured.experts": 6}, "structured.experts = 6 leaves a token too few to choose from: give 0 to 4"),
        ({"structured.shared": 17}, "structured.shared = 17 is more than shared experts have: give 0 to 16 channels"),
        ({"structured.shared": 1, "structured.protect_last": 2}, "no block to prune has shared experts"),
        ({"structured.experts": 4, "structured.shared": 16}, "experts = 4 and structured.shared = 16 take a share of"),
        ({"structured.allocation": "uniform", "structured.shared": 3, "export.compat": "official"},
         "its shared experts keep 13 channels, no multiple of the"),
    ],
)  # fmt: skip
def test_what_groups_rule_out(tiny_checkpoint, text_path, changes, said):
    values = SMALL | {"calibration.source": str(text_path), "structured.ratio": 0.3, "structured.score": "wanda"}
    with pytest.raises(UserError, match=said):
        prune(load_model(tiny_checkpoint("llada2")), Config.load(overrides=values | changes))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"structured.split": "measured"}, {"structured.split": "equal", "structured.shared": 5}),
        ({"structured.split": 0}, {"structured.shared": 6}),
        ({"structured.split": 1, "structured.ratio": 0.5}, {"structured.shared": 9}),
        # 6 experts lose what two whole ones leave to lose: 9 channels of 16, of which 7 stay where 8 shared ones go
        ({"structured.split": 0, "structured.experts": 2, "structured.ratio": 0.5}, {"structured.shared": 8}),
    ],
)
@pytest.mark.parametrize("compat", ["uniform", "official"])
def test_an_export_in_the_familys_own_keys_is_refused_with_a_remedy_that_works(
    tiny_checkpoint, changes, remedy, compat
):
    """From shapes alone, before any work; what it says to set passes, and leaves shared experts as wide as others."""
    source, values = tiny_checkpoint("llada2"), {"export.compat": compat, "structured.allocation": "uniform"}
    values |= {"structured.ratio": 0.3} | changes
    said = (
        f"{compat} is not possible: its shared experts keep 16 channels, .*"
        + r"\(set {}\); or export as free".format(" and ".join(f"{key} to {value}" for key, value in remedy.items()))
    )
    with pytest.raises(UserError, match=said):
        inspect_checkpoint(source, Config.load(overrides=values))
    after = inspect_checkpoint(source, Config.load(overrides=values | remedy))["blocks"][2]["after"]
    assert after["channels"] == after["shared"] == SIZE - remedy["structured.shared"]


def test_an_export_that_no_number_of_shared_channels_allows(tiny_checkpoint):
    values = {"export.compat": "official", "structured.allocation": "uniform", "structured.ratio": 0.2}
    values |= {"structured.split": 0, "structured.experts": 2}
    with pytest.raises(UserError, match="no structured.shared mends that at this ratio: try one a little higher"):
        inspect_checkpoint(tiny_checkpoint("llada2"), Config.load(overrides=values))


def test_widths_of_a_model_that_is_cut_before_are_left_to_its_own_run(tiny_model):
    """A later step of a gradual run has other shapes than the dense model, by which it is checked beforehand."""
    values = {"export.compat": "official", "structured.allocation": "uniform", "structured.split": 1}
    request = resolve_structured(Config.load(overrides=values | {"structured.shared": 5}), tiny_model("llada2"))
    assert at_ratio(request, 0.3).settings.ratio == 0.3  # 11 channels of each stay
    with pytest.raises(UserError, match="its shared experts keep 11 channels, no multiple of the .* of others"):
        at_ratio(request, 0.4)
    assert at_ratio(request, 0.4, cut_before=True).settings.ratio == 0.4


def test_no_work_begins_for_an_export_that_shapes_rule_out(tiny_checkpoint, text_path, tmp_path):
    values = SMALL | {"calibration.source": str(text_path), "structured.ratio": 0.3, "export.compat": "official"}
    config, work = Config.load(overrides=values | {"structured.allocation": "uniform"}), tmp_path / "out.work"
    with pytest.raises(UserError, match="its shared experts keep 16 channels"):
        prune_checkpoint(str(tiny_checkpoint("llada2")), tmp_path / "out", config, work=Work(work))
    assert not any(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": (0, 1, 2, 4), "channels": tuple(range(48)) + tuple(range(64, 80))}, "groups of experts keep uneq"),
        ({"experts": (0, 4), "channels": tuple(range(16)) + tuple(range(64, 80))}, "a token gets 2: keep at least 4"),
        ({"shared": (16,)}, "shared names 16, but the model has 16"),
    ],
)  # fmt: skip
def test_plans_that_do_not_fit(tiny_model, changes, said):
    adapter = Adapter(tiny_model("llada2"))
    plan = identity_plan(adapter)
    with pytest.raises(UserError, match=said):
        replace(plan, blocks=(plan.blocks[0], replace(plan.blocks[1], **changes), plan.blocks[2])).check(adapter)


def test_shared_channels_of_a_model_without_any(tiny_checkpoint):
    with pytest.raises(UserError, match="structured.shared = 1, but no block to prune has shared experts"):
        prune(load_model(tiny_checkpoint("llada-moe")), Config.load(overrides={"structured.shared": 1}))


def test_a_plan_keeps_its_shared_channels_in_a_file(tiny_model, tmp_path):
    plan = random_plan(Adapter(tiny_model("llada2")), 3)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


def test_the_public_shape_at_half_its_size(published_config):
    """LLaDA2.0-mini, from the values of its config.json alone."""
    values = {
        "structured.ratio": 0.5,
        "structured.experts": 64,
        "structured.allocation": "uniform",
        "structured.split": 0,
    }
    values |= {"structured.shared": 160, "model.mask_id": 156895}
    result = inspect_checkpoint(published_config("llada2"), Config.load(overrides=values))
    embeddings, attention, expert = 157184 * 2048, 2048 * 128 * (16 + 2 * 4 + 16) + 2 * 128, 3 * 2048 * 512
    mixture = 257 * expert + 256 * 2049
    norms = 2 * 2048
    total = 2 * embeddings + 2048 + 20 * (attention + norms) + 19 * mixture + 3 * 2048 * 5120
    assert result["parameters"]["before"] == total == 16_255_643_392
    first, last = (result["blocks"][index] for index in (0, 19))
    assert (first["before"]["channels"], first["before"]["experts"], first["after"]["shared"]) == (5120, 0, 0)
    assert (last["before"]["experts"], last["after"]["experts"], last["after"]["shared"]) == (256, 192, 352)
    # half a block less what goes whole, by channels of 192 experts: 336.4 stay, as a multiple of 32
    assert result["choices"][0]["channels"] == last["after"]["channels"] == 352
    assert result["memory"]["refit"] < 10e9  # sums of all parts of a mixture, and not of as many plain MLPs
