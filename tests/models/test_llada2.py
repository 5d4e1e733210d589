"""LLaDA2: its router by hand, its own layout with projections in one weight, and config.json of other models."""

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from structprune import load_model, save_pruned
from structprune.checkpoint.masked import save_masked
from structprune.config import ExportSettings, ModelSettings
from structprune.masking import Masks, mask_adapters, merge_adapters
from structprune.masking.masks import pack_bits
from structprune.models.adapter import Adapter
from structprune.models.llada2_structprune import GroupedRouter, StructpruneLLaDA2Config
from structprune.models.loading import map_model
from structprune.models.rotary_structprune import rotary_tables, rotate
from structprune.runs.ghost import read_ghost
from tests.models.alike import assert_alike

IDS = torch.randint(0, 2000, (2, 11), generator=torch.Generator().manual_seed(0))
JOINED = "model.layers.1.attention.query_key_value.weight"
APART = tuple(f"model.layers.1.attention.{role}_proj.weight" for role in "qkv")


@torch.no_grad()
def test_the_router_by_hand():
    """Four groups of two, of which a token sees two: a bias opens a group, and changes no weight."""
    config = StructpruneLLaDA2Config(num_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2)
    router, odds = GroupedRouter(1, 8, config), torch.tensor([0.9, 0.1, 0.6, 0.55, 0.8, 0.3, 0.5, 0.4])
    router.weight[:, 0] = odds.logit()
    weights, chosen = router(torch.ones(1, 1))
    assert chosen.tolist() == [[4, 2, 3]]  # groups 1 (1.15) and 2 (1.1), not 0 (1.0), which has the best expert
    assert torch.allclose(weights, 2.5 * torch.tensor([[0.8, 0.6, 0.55]]) / 1.95)
    router.expert_bias[1] = 0.3
    weights, chosen = router(torch.ones(1, 1))
    assert chosen.tolist() == [[0, 2, 3]] and torch.allclose(weights, 2.5 * torch.tensor([[0.9, 0.6, 0.55]]) / 2.05)


@torch.no_grad()
def test_the_router_is_exact_under_autocast():
    config = StructpruneLLaDA2Config(num_experts=64, num_experts_per_tok=8)
    torch.manual_seed(0)
    router, rows = GroupedRouter(32, 64, config), torch.randn(200, 32)
    weights, chosen = router(rows)
    with torch.autocast("cpu", torch.bfloat16):
        again, same = router(rows)
        assert torch.nn.functional.linear(rows, router.weight).dtype == torch.bfloat16
    assert torch.equal(same, chosen) and torch.equal(again, weights) and weights.dtype == torch.float32
    assert router.to("meta")(rows.to("meta"))[0].shape == (200, 8)  # shapes alone, for which there is no autocast


def test_a_part_of_a_head_turns():
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))  # (B, H, T, D)
    tables = rotary_tables(torch.arange(5)[None], 4, 10000.0)
    turned = rotate(x, *tables)
    assert torch.equal(turned[..., 4:], x[..., 4:]) and torch.equal(turned[..., :4], rotate(x[..., :4], *tables))
    assert not torch.allclose(turned[:, :, 1:, :4], x[:, :, 1:, :4])


@torch.no_grad()
def test_a_file_that_joins_weights_is_that_of_weights_apart(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint("llada2")
    model, state = load_model(directory), load_file(directory / "model.safetensors")
    assert torch.equal(torch.cat([model.state_dict()[name] for name in APART]), state[JOINED])
    assert not any(name.endswith("q_proj.weight") for name in state)
    mapped = map_model(directory)
    assert_alike(mapped, model, IDS)
    assert read_ghost(directory, ModelSettings()).model.num_parameters() == model.num_parameters()
    parts = tmp_path / "apart"
    model.save_pretrained(parts)
    assert set(APART) < load_file(parts / "model.safetensors").keys()
    assert_alike(load_model(parts), model, IDS)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_both_layouts_load_without_structprune(tiny_checkpoint, tmp_path, tied):
    model = load_model(tiny_checkpoint("llada2", tie_word_embeddings=tied))
    expected = model(IDS).logits
    for compat in ("official", "free"):
        directory = save_pruned(model, tmp_path / compat, ExportSettings(compat=compat, max_shard_size="100KB"))
        values = json.loads((directory / "config.json").read_text())
        kind = ("llada2_moe", 1) if compat == "official" else ("structprune_llada2", None)
        assert (values["model_type"], values.get("first_k_dense_replace")) == kind
        again = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        assert (again(IDS).logits - expected).abs().max() <= 1e-5
        assert_alike(load_model(directory), model, IDS)
        names = again.state_dict().keys()
        assert (JOINED in names) == (compat == "official") != (APART[0] in names)
        again.save_pretrained(tmp_path / f"{compat}-again")
        assert_alike(load_model(tmp_path / f"{compat}-again"), model, IDS)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_masked_weight_keeps_its_place_in_the_file(tiny_checkpoint, tmp_path, pickled, mapped):
    """Only the rows of the keys change; order, shapes and all other bytes stay."""
    directory = tiny_checkpoint("llada2", torch_dtype="bfloat16")
    before = load_file(directory / "model.safetensors")
    if pickled:
        torch.save(before, directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    if pickled and mapped:
        pytest.skip("pickled weights are not mapped")
    model = map_model(directory) if mapped else load_model(directory, allow_pickle=pickled)
    with torch.no_grad():
        model.get_parameter(APART[1])[:, ::2] = 0
    out = save_masked(model, tmp_path / "out", changed=[APART[1]])
    after = load_file(out / "model.safetensors")
    rows = slice(32, 48)  # behind 4 heads of 8, 2 heads
    expected = before[JOINED].clone()
    expected[rows, ::2] = 0
    assert before.keys() == after.keys() and torch.equal(after[JOINED], expected)
    assert all(torch.equal(after[name], before[name]) for name in before if name != JOINED)
    assert torch.equal(load_model(out).get_parameter(APART[1]), expected[rows].float())


def test_masks_are_known_by_the_names_of_both_layouts(tiny_checkpoint, tmp_path):
    """A file has those of the checkpoint beside it; a model that has the parts finds them, with adapters too."""
    model = load_model(tiny_checkpoint("llada2"))
    keep = torch.rand(16, 32, generator=torch.Generator().manual_seed(2)) > 0.5  # (O, C)
    masks = Masks({APART[1]: pack_bits(keep)}, {APART[1]: (16, 32)})
    joined = masks.joined(model)
    assert joined.shapes == {JOINED: (64, 32)} and torch.equal(joined.kept(JOINED)[32:48], keep)
    assert joined.kept(JOINED)[:32].all() and joined.kept(JOINED)[48:].all()
    joined.save(tmp_path / "masks.safetensors")
    read = Masks.load(tmp_path / "masks.safetensors")
    assert torch.equal(read.split(model).kept(APART[1]), keep)
    config = LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config)
    with mask_adapters(adapted, read):
        pass
    merged = merge_adapters(adapted, read)
    weight = merged.get_parameter(APART[1])
    assert (weight[~keep] == 0).all() and (weight[keep] != model.get_parameter(APART[1])[keep]).all()


def test_blocks_are_of_32_tokens_where_nothing_is_said(tiny_checkpoint):
    assert load_model(tiny_checkpoint("llada2", block_size=None)).layout.size == 32
    assert load_model(tiny_checkpoint("llada2", block_size=None, name="other"), block_size=8).layout.size == 8


def test_the_first_block_has_a_plain_mlp(tiny_model):
    model = tiny_model("llada2")
    plain, mixture, _ = Adapter(model).blocks
    assert plain.mixture is None and (plain.widths.channels, plain.widths.experts, plain.widths.shared) == (48, 0, 0)
    assert mixture.mixture and (mixture.widths.channels, mixture.widths.experts, mixture.widths.shared) == (16, 8, 16)
    every = Adapter(tiny_model("llada2", first_k_dense_replace=0)).blocks
    assert {block.widths for block in every} == {mixture.widths}
    assert not any(block.mixture for block in Adapter(tiny_model("llada2", first_k_dense_replace=9)).blocks)


@pytest.mark.parametrize("changes, said", [
    ({"num_experts": 7}, "num_experts = 7 in n_group = 2"),
    ({"num_experts_per_tok": 5}, "num_experts = 8 in n_group = 2, 5 of a token from 1 groups"),
    ({"num_experts": 2, "num_experts_per_tok": 1}, "num_experts = 2 in n_group = 2, 1 of a token"),
    ({"topk_group": 3}, "topk_group = 3 of n_group = 2"), ({"n_group": 0}, "n_group = 0 is not a whole number from 1"),
    ({"partial_rotary_factor": 0.4}, "partial_rotary_factor = 0.4 of heads of 8"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5 of heads of 8"),
    ({"use_qk_norm": False}, "use_qk_norm = False is not supported"), ({"use_bias": True}, "use_bias = True is not"),
    ({"score_function": "softmax"}, "score_function = 'softmax' is not supported (llada2 needs 'sigmoid')"),
    ({"block_size": 0}, "block_size = 0"), ({"block_size": "4"}, "block_size = '4'"),
    ({"n_group": 2.0}, "n_group = 2.0 is not a whole number"),
    ({"intermediate_size": None}, "intermediate_size = None is not a whole number from 1"),
    ({"first_k_dense_replace": True}, "first_k_dense_replace = True"), ({"num_shared_experts": -1}, "_experts = -1"),
    ({"routed_scaling_factor": "2"}, "routed_scaling_factor = '2'"),
    ({"num_key_value_heads": 4}, "query_key_value.weight is (64, 32), but config.json asks for 96 rows"),
    ({"moe_intermediate_size": None}, "no positive integer 'moe_intermediate_size', which llada2 needs"),
    ({"num_shared_experts": 2}, "mlp.shared_experts.gate_proj.weight is (16, 32), but config.json asks for (32, 32)"),
])  # fmt: skip
def test_config_json_that_cannot_be(tiny_checkpoint, message, change_config, changes, said):
    assert said in message(change_config(tiny_checkpoint("llada2"), **changes))
