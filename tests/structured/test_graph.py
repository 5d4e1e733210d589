"""The dependency graph finds exactly the units that docs/methods.md section 5 names, in every family and form."""

import pytest

from structprune.models.adapter import Adapter
from structprune.structured.graph import coupled_units

MODELS = {
    "llada": ("llada", {}),
    "llada with biases": ("llada", {"include_bias": True, "include_qkv_bias": True}),
    "llada with shared kv heads": ("llada", {"n_kv_heads": 2}),
    "dream": ("dream", {}),
    "dream with kv_heads = heads": ("dream", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "dream with one kv head": ("dream", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_units_are_exactly_those_of_the_definition(tiny_model, name):
    family, changes = MODELS[name]
    model = tiny_model(family, **changes)
    units = coupled_units(model)
    prefix = "model.layers.{}.self_attn." if family == "dream" else "model.transformer.blocks.{}."
    mlp = "model.layers.{}.mlp." if family == "dream" else prefix
    output, rows, down = ("o_proj", ("gate_proj", "up_proj"), "down_proj") if family == "dream" else (
        "attn_out", ("ff_proj", "up_proj"), "ff_out",
    )  # fmt: skip
    assert set(units) == {(index, kind) for index in range(3) for kind in ("attention", "channels")}
    for index in range(3):
        attention, channels = units[index, "attention"], units[index, "channels"]
        assert attention.outputs == {prefix.format(index) + name for name in ("q_proj", "k_proj", "v_proj")}
        assert attention.inputs == {prefix.format(index) + output}
        assert channels.outputs == {mlp.format(index) + name for name in rows}
        assert channels.inputs == {mlp.format(index) + down}


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_blocks_that_lack_something_have_no_such_units(tiny_model, gaps, family):
    units, whole = coupled_units(tiny_model(family, **gaps(family))), coupled_units(tiny_model(family))
    assert set(units) == {(0, "attention"), (1, "attention"), (1, "channels"), (3, "channels")}
    assert [units[key] for key in sorted(units)[:3]] == [whole[key] for key in sorted(units)[:3]]
    assert {name.split(".")[-1] for name in units[3, "channels"].outputs} == (
        {"gate_proj", "up_proj"} if family == "dream" else {"ff_proj", "up_proj"}
    )


def test_tracing_leaves_the_model_alone(tiny_model):
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.requires_grad_(False)
    coupled_units(model)
    assert model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())
    for name, value in model.state_dict().items():
        assert value.equal(before[name])


def test_a_pruned_model_can_be_traced_again(tiny_model):
    from dataclasses import replace

    from structprune.structured.plan import identity_plan
    from structprune.structured.surgery import apply_plan

    model = tiny_model()
    plan = identity_plan(Adapter(model))
    cut = replace(plan.blocks[1], query_heads=(0, 3), kv_heads=(0, 3), channels=tuple(range(5)))
    small = apply_plan(model, replace(plan, blocks=(plan.blocks[0], cut, plan.blocks[2])))
    assert coupled_units(small) == coupled_units(model)
