"""The adapter's contract, the same for every family, and per-layer widths in the configuration."""

import warnings

import pytest
import torch
from torch import nn

from structprune import Plan, apply_plan, load_model, save_pruned
from structprune.models.adapter import CONSUMERS, Adapter, Widths, block_widths, set_widths
from structprune.models.families import FAMILIES, ROLES, family_of
from structprune.structured.plan import BlockPlan
from tests.tiny_values import DENSE

WIDTHS = {"llada": Widths(4, 4, 48), "mmada": Widths(4, 4, 48), "dream": Widths(6, 2, 48)}
LINEARS = {
    "llada": "q_proj k_proj v_proj attn_out ff_proj up_proj ff_out",
    "dream": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "mlp.gate_proj mlp.up_proj mlp.down_proj",
}
INPUTS = ("attention_input", "mixed", "mlp_input", "activated")
PREFIX = {"llada": "model.transformer.blocks.{}.", "dream": "model.layers.{}."}


@pytest.fixture(params=["llada", "mmada", "dream"])
def family(request):
    return request.param


@pytest.fixture
def model(tiny_checkpoint, family):
    return load_model(tiny_checkpoint(family))


def test_roles_resolve_to_the_seven_linears_by_their_published_names(model, family):
    layout = "dream" if family == "dream" else "llada"
    modules = dict(model.named_modules())
    for index, block in enumerate(Adapter(model).blocks):
        names = [PREFIX[layout].format(index) + name for name in LINEARS[layout].split()]
        assert [block.names[role] for role in ROLES] == names
        assert block.name == PREFIX[layout].format(index).rstrip(".") and modules[block.name] is block.module
        for role in ROLES:
            assert isinstance(block[role], nn.Linear) and modules[block.names[role]] is block[role]


def test_widths_are_those_of_the_linears(model, family):
    adapter = Adapter(model)
    assert len(adapter.blocks) == 3 and adapter.head_dim == 8 and adapter.hidden_size == 32
    for block in adapter.blocks:
        assert block.widths == WIDTHS[family]
        assert block["query"].weight.shape == (block.widths.query_heads * 8, 32)
        assert block["key"].weight.shape == block["value"].weight.shape == (block.widths.kv_heads * 8, 32)
        assert block["attention_output"].weight.shape == (32, block.widths.query_heads * 8)
        assert block["gate"].weight.shape == block["up"].weight.shape == (block.widths.channels, 32)
        assert block["down"].weight.shape == (32, block.widths.channels)


def test_vocabulary_mask_and_device(model):
    adapter = Adapter(model)
    assert (adapter.vocabulary, adapter.mask_id, adapter.device) == (2048, 2047, torch.device("cpu"))
    assert adapter.family is family_of(model.config) and adapter.family in FAMILIES


def test_mix_and_activate_end_where_the_consumers_begin(model):
    """What the two consumers read in a real forward pass is what `mix` and `activate` return."""
    ids = torch.arange(20).reshape(2, 10)  # (B, T)
    block = Adapter(model).blocks[1]
    seen = {}
    handles = [
        block[role].register_forward_pre_hook(lambda _, args, role=role: seen.update({role: args[0]}))
        for role in CONSUMERS
    ]
    handles.append(block.module.register_forward_pre_hook(lambda _, args: seen.update(inputs=args)))
    with torch.no_grad():
        model(ids)
        x, rotary, mask = seen["inputs"]  # (B, T, C)
        mixed = block.module.mix(x, rotary, mask)  # (B, T, H*D)
        middle = x + block["attention_output"](mixed)  # (B, T, C)
        assert torch.equal(seen["attention_output"], mixed)
        assert torch.equal(seen["down"], block.module.activate(middle))
    for handle in handles:
        handle.remove()


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="structprune.load_model"):
        family_of(object())


@pytest.mark.parametrize("kind, kept", [
    ("llada", [Widths(2, 2, 17), Widths(4, 4, 48), Widths(1, 1, 48)]),
    ("dream", [Widths(4, 2, 48), Widths(3, 1, 8), Widths(6, 2, 1)]),
    ("llada", [Widths(0, 0, 17), Widths(4, 4, 48), Widths(1, 1, 48)]),
    ("dream", [Widths(0, 0, 48), Widths(0, 0, 8), Widths(6, 2, 0)]),  # more blocks without attention than with
    ("dream", [Widths(0, 0, 0), Widths(6, 2, 48)]),  # fewer blocks
])  # fmt: skip
def test_set_widths_round_trip(tiny_model, kind, kept):
    """Widths written into a config come back, through JSON too, and the model built from it has them."""
    model = tiny_model(kind)
    family = family_of(model.config)
    config = family.config_class(**set_widths(model.config.to_dict(), family, kept))
    again = family.config_class(**family.config_class.from_dict(config.to_dict()).to_dict())
    for made in (config, again):
        assert [block_widths(made, family, index) for index in range(len(kept))] == kept
        assert all(layer > 0 for layer in (made.to_dict()[key] for key in family.width_keys.values()))
    for block, widths in zip(Adapter(family.model_class(again)).blocks, kept, strict=True):
        assert block.widths == widths
        if widths.query_heads:
            assert block["query"].out_features == widths.query_heads * 8
            assert block["key"].out_features == widths.kv_heads * 8
        if widths.channels:
            assert block["down"].in_features == widths.channels


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_a_block_says_what_it_has(tiny_model, gaps, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as torch's, about the initialisation of empty tensors
        adapter = Adapter(tiny_model(kind, **gaps(kind)))
    blocks = adapter.blocks
    assert [block.kinds for block in blocks] == [("attention",), ("attention", "channels"), (), ("channels",)]
    assert [block.consumers for block in blocks] == [("attention_output",), CONSUMERS, (), ("down",)]
    assert [tuple(block.readers) for block in blocks] == [INPUTS[:2], INPUTS, (), INPUTS[2:]]
    assert [tuple(block.names) for block in blocks] == [ROLES[:4], ROLES, (), ROLES[4:]]
    assert [len(list(block.module.parameters())) for block in blocks] == (
        [5, 9, 0, 4] if kind == "llada" else [8, 12, 0, 4]
    )
    assert adapter.cores == [blocks[0].core, blocks[1].core]
    with pytest.raises(KeyError, match="down"):
        blocks[0]["down"]


@pytest.mark.parametrize("kind", [*DENSE, "a2d-qwen3-blocks"])
@torch.no_grad()
def test_what_a_block_lacks_adds_nothing(tiny_model, gaps, kind):
    model = tiny_model(kind, **gaps(kind))
    rotary, x = model.rotary(6, "cpu"), torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))  # (B, T, C)
    first, second, third, fourth = model.blocks
    after = x + first.part("attention_output")(first.mix(x, rotary))  # (B, T, C)
    assert torch.equal(first(x, rotary), after) and first.add_mlp(x) is x
    assert not torch.equal(second.add_mlp(x), x) and not torch.equal(second.add_attention(x, rotary), x)
    assert third(x, rotary) is x
    after = x + fourth.part("down")(fourth.activate(x))  # (B, T, C)
    assert torch.equal(fourth(x, rotary), after) and fourth.add_attention(x, rotary) is x


def test_equal_widths_become_the_global_value(tiny_model):
    model = tiny_model("llada")
    family = family_of(model.config)
    values = set_widths(model.config.to_dict(), family, [Widths(3, 3, 16)] * 3)
    assert "per_layer_config" not in values
    assert (values["n_heads"], values["n_kv_heads"], values["mlp_hidden_size"], values["head_dim"]) == (3, 3, 16, 8)
    mixed = set_widths(values, family, [Widths(3, 3, 16), Widths(3, 3, 16), Widths(3, 3, 20)])
    assert mixed["per_layer_config"] == {"2": {"mlp_hidden_size": 20}} and mixed["mlp_hidden_size"] == 16
    back = set_widths(mixed, family, [Widths(3, 3, 16)] * 3)  # overrides of an earlier prune do not linger
    assert "per_layer_config" not in back


def test_global_heads_are_those_of_one_block(tiny_checkpoint, tmp_path):
    """Else they need not divide each other, and config.json would be refused."""
    dense, keep = load_model(tiny_checkpoint("dream")), tuple(range(48))
    blocks = [BlockPlan((3, 4, 5), (1,), keep), BlockPlan((0, 1, 3, 4), (0, 1), keep), BlockPlan((0, 3), (0, 1), keep)]
    out = save_pruned(apply_plan(dense, Plan("dream", tuple(blocks))), tmp_path / "out")
    again = Adapter(load_model(out))
    assert [block.widths for block in again.blocks] == [Widths(3, 1, 48), Widths(4, 2, 48), Widths(2, 2, 48)]
    values = set_widths(
        again.model.config.to_dict(), again.family, [Widths(3, 1, 48), Widths(4, 2, 48), Widths(6, 2, 48)]
    )
    assert (values["num_attention_heads"], values["num_key_value_heads"]) in {(3, 1), (4, 2), (6, 2)}
