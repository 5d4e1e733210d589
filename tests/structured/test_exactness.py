"""The cut is exact: logits equal the dense model's with the removed units' consumer columns zeroed."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from structprune.models.adapter import CONSUMER, CONSUMERS, Adapter
from structprune.structured import surgery
from structprune.structured.plan import BlockPlan, Plan, identity_plan
from structprune.structured.surgery import apply_plan
from tests.tiny_values import DENSE

MODELS = {
    "mha": ("llada", {"n_kv_heads": 4}),
    "mha with biases": ("llada", {"n_kv_heads": 4, "include_bias": True}),
    "mha of dream": ("dream", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "gqa of llada": ("llada", {"d_model": 48, "n_heads": 6, "n_kv_heads": 2, "include_qkv_bias": True}),
    "gqa of dream": ("dream", {}),
    "mha of a2d": ("a2d-llama", {}),
    "gqa of a2d, heads normed": ("a2d-qwen3", {}),
    "gqa of a2d, biases of projections": ("a2d-qwen2", {}),
    "gqa of a2d in blocks": ("a2d-qwen3-blocks", {}),
    "gqa of sdar": ("sdar", {}),
    "gqa of nemotron": ("nemotron-labs", {}),
}
ROUNDED = {"sdar": 2e-5, "nemotron-labs": 2e-5}  # sums in another order come near 1e-5 here
BOTH = ("attention", "channels")
FORMS = ("query_heads", "kv_groups", "both")
IDS = torch.randint(0, 2048, (2, 11), generator=torch.Generator().manual_seed(0))


def random_block(widths, form: str, draw: random.Random) -> BlockPlan:
    """A random valid block plan: any heads (MHA), whole KV groups, as many query heads of each, or both at once."""
    some = lambda count: sorted(draw.sample(range(count), draw.randint(1, count)))  # noqa: E731
    per = widths.query_heads // widths.kv_heads
    groups = some(widths.kv_heads) if per == 1 or form != "query_heads" else list(range(widths.kv_heads))
    size = per if per == 1 or form == "kv_groups" else draw.randint(1, per)
    heads = sorted(group * per + member for group in groups for member in draw.sample(range(per), size))
    return BlockPlan(tuple(heads), tuple(groups), tuple(some(widths.channels)))


def random_plan(adapter: Adapter, form: str, seed: int) -> Plan:
    draw = random.Random(seed)
    return Plan(adapter.family.name, tuple(random_block(block.widths, form, draw) for block in adapter.blocks))


@torch.no_grad()
def with_zeroed_columns(model, plan: Plan):
    """The dense model in which the consumers do not read what the plan removes."""
    dense = copy.deepcopy(model)
    for block, kept in zip(Adapter(dense).blocks, plan.blocks):
        for head in set(range(block.widths.query_heads)) - set(kept.query_heads):
            block["attention_output"].weight[:, head * block.head_dim : (head + 1) * block.head_dim] = 0
        for channel in set(range(block.widths.channels)) - set(kept.channels):
            block["down"].weight[:, channel] = 0
    return dense


@torch.inference_mode()
def difference(small, model, plan: Plan) -> float:
    """Largest gap between the cut model's logits and those it must have."""
    return (small(IDS).logits - with_zeroed_columns(model, plan)(IDS).logits).abs().max().item()


CASES = [(name, form) for name in MODELS for form in FORMS if form == "both" or not name.startswith("mha")]


@pytest.mark.slow
@pytest.mark.parametrize("name, form", CASES)
def test_random_plans_cut_exactly(tiny_model, name, form):
    family, changes = MODELS[name]
    model = tiny_model(family, **changes)
    with torch.inference_mode():
        dense = model(IDS).logits
    for seed in range(6):
        plan = random_plan(Adapter(model), form, seed)
        small = apply_plan(model, plan)
        assert [block.widths for block in Adapter(small).blocks] == [block.widths for block in plan.blocks]
        assert difference(small, model, plan) <= ROUNDED.get(family, 1e-5), (seed, plan)
        with torch.inference_mode():
            assert (small(IDS).logits - dense).abs().max() > 1e-3  # the plan does remove something that counts


# kinds of units that each block keeps
KEPT = {
    "no attention in one": [("channels",), BOTH, BOTH],
    "no MLP in one": [BOTH, BOTH, ("attention",)],
    "no block": [BOTH, (), BOTH],
    "no first block": [(), BOTH, ("channels",)],
    "all three": [("attention",), (), ("channels",)],
}


@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_goes_as_a_whole_is_cut_exactly(tiny_model, name, kept, output_bias):
    """As the dense model with the consumer's weight and bias zeroed, whether the rest is cut too or not."""
    family, changes = MODELS[name]
    model = tiny_model(family, **changes)
    for block in Adapter(model).blocks:
        for role in CONSUMERS:
            if block[role].bias is not None:
                block[role].bias.normal_(generator=torch.Generator().manual_seed(1))
    whole, narrower = identity_plan(Adapter(model)), random_plan(Adapter(model), "both", 4)
    for plan, tolerance in ((whole, 1e-6), (narrower, ROUNDED.get(family, 1e-5))):
        plan = keeping(plan, KEPT[kept])
        small, expected = apply_plan(model, plan, output_bias), with_zeroed_columns(model, plan)
        assert [block.kinds for block in Adapter(small).blocks] == [kinds for kinds in KEPT[kept] if kinds]
        for dense, kinds in zip(Adapter(expected).blocks, KEPT[kept]):
            for kind in set(BOTH) - set(kinds):
                if dense[CONSUMER[kind]].bias is not None:
                    dense[CONSUMER[kind]].bias.zero_()
        assert (small(IDS).logits - expected(IDS).logits).abs().max() <= tolerance
        assert (small(IDS).logits - model(IDS).logits).abs().max() > 1e-3


def keeping(plan: Plan, kinds: list[tuple[str, ...]]) -> Plan:
    """The plan without what `kinds`, of every block, does not name."""
    lists = {"attention": {"query_heads": (), "kv_heads": ()}, "channels": {"channels": ()}}
    blocks = []
    for block, here in zip(plan.blocks, kinds, strict=True):
        for kind in set(BOTH) - set(here):
            block = replace(block, **lists[kind])
        blocks.append(block)
    return replace(plan, blocks=tuple(blocks))


@pytest.mark.parametrize("family", [*DENSE, "a2d-qwen3-blocks"])
@torch.no_grad()
def test_a_model_with_gaps_is_cut_exactly(tiny_model, gaps, family):
    """Also a block that has neither attention nor MLP, which is deleted."""
    model = tiny_model(family, **gaps(family))
    same = apply_plan(model, identity_plan(Adapter(model)))
    assert torch.equal(same(IDS).logits, model(IDS).logits) and len(same.blocks) == 3
    whole = identity_plan(Adapter(model)).blocks
    heads, kv_heads = ((0, 3), (0, 3)) if family == "llada" else ((0, 2, 3, 5), (0, 1))
    cut = BlockPlan(heads, kv_heads, tuple(range(0, 48, 3)))
    plan = Plan(family, (replace(cut, channels=()), cut, whole[2], replace(whole[3], channels=tuple(range(7)))))
    small = apply_plan(model, plan)
    expected = copy.deepcopy(model)
    for block, kept in zip(Adapter(expected).blocks, plan.blocks):
        if "attention" in block.kinds:
            columns = block["attention_output"].weight.unflatten(1, (-1, block.head_dim))  # (C, H, D)
            gone = [head for head in range(block.widths.query_heads) if head not in kept.query_heads]
            columns[:, gone] = 0
        if "channels" in block.kinds:
            block["down"].weight[:, [channel for channel in range(48) if channel not in kept.channels]] = 0
    assert (small(IDS).logits - expected(IDS).logits).abs().max() <= 1e-5
    assert (small(IDS).logits - model(IDS).logits).abs().max() > 1e-3


def cut_of(widths, kind: str, form: str) -> BlockPlan:
    """A block plan that cuts one kind of unit."""
    every = [tuple(range(count)) for count in (widths.query_heads, widths.kv_heads, widths.channels)]
    if kind == "channels":
        return BlockPlan(every[0], every[1], tuple(range(0, 40, 2)))
    if form == "kv_groups":
        return BlockPlan(every[0][: widths.query_heads // widths.kv_heads], (0,), every[2])
    if form == "query_heads":
        return BlockPlan((0, widths.query_heads // widths.kv_heads), every[1], every[2])
    return BlockPlan((0, 2), (0, 2), every[2])


@pytest.mark.parametrize(
    "name, form", [("mha", "both"), ("gqa of dream", "query_heads"), ("gqa of llada", "kv_groups")]
)
@pytest.mark.parametrize("kind", ["attention", "channels"])
def test_a_wrong_cut_is_seen(tiny_model, monkeypatch, name, form, kind):
    family, changes = MODELS[name]
    model = tiny_model(family, **changes)
    identity, cut = identity_plan(Adapter(model)), surgery._cut
    kept = cut_of(Adapter(model).blocks[1].widths, kind, form)
    plan = Plan(identity.family, (identity.blocks[0], kept, identity.blocks[2]))
    assert difference(apply_plan(model, plan), model, plan) <= 1e-5

    block = Adapter(model).blocks[1]
    consumer, width = block.names[CONSUMER[kind]], 1 if kind == "channels" else block.head_dim

    def off_by_one(state, name, index, reads):
        if name == consumer:  # it reads the unit after its last
            assert reads
            index = torch.cat((index[:-width], index[-width:] + width))
        cut(state, name, index, reads)

    monkeypatch.setattr(surgery, "_cut", off_by_one)
    assert difference(apply_plan(model, plan), model, plan) > 1e-3


def test_uncut_tensors_are_shared_and_nothing_of_the_dense_model_changes(tiny_model):
    model = tiny_model("dream")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = apply_plan(model, random_plan(Adapter(model), "both", 1))
    assert small.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert small.num_parameters() < model.num_parameters() and not small.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_the_identity_plan_changes_nothing(tiny_model):
    for family in ("llada", "dream"):
        model = tiny_model(family)
        small = apply_plan(model, identity_plan(Adapter(model)))
        with torch.inference_mode():
            assert torch.equal(small(IDS).logits, model(IDS).logits)


def test_an_output_bias_starts_at_zero(tiny_model):
    model = tiny_model()
    plan = random_plan(Adapter(model), "both", 2)
    plain, biased = apply_plan(model, plan), apply_plan(model, plan, output_bias=True)
    for block in Adapter(biased).blocks:
        assert block["attention_output"].bias.eq(0).all() and block["down"].bias.eq(0).all()
    with torch.inference_mode():
        assert torch.allclose(biased(IDS).logits, plain(IDS).logits, atol=1e-6)


def test_a_cut_keeps_the_dtype(tiny_model):
    model = tiny_model("dream").bfloat16()
    small = apply_plan(model, random_plan(Adapter(model), "both", 3), output_bias=True)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16} and small.dtype == torch.bfloat16
