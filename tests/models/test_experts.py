"""Mixtures of experts: what a block computes by hand, and which config.json describes one."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

from structprune import apply_plan, load_model, save_pruned
from structprune.config import ExportSettings
from structprune.models.adapter import Adapter, ExpertWidths
from structprune.models.experts_structprune import tokens_by_expert, tokens_of
from structprune.structured.plan import identity_plan
from tests.models.alike import assert_alike


def by_hand(block, x: torch.Tensor) -> torch.Tensor:
    """The stream after the MLP of a mixture, token by token: (T, C) -> (T, C)."""
    outputs = []
    for token in block.module.part("mlp_norm")(x):  # (C,)
        shares = (block.module.part("router").weight @ token).softmax(0)  # (E,)
        total = torch.zeros_like(token)
        for expert in shares.argsort(descending=True)[:2].tolist():
            gate, up, down = (block[f"{role}.{expert}"].weight for role in ("gate", "up", "down"))
            total += shares[expert] * (down @ (F.silu(gate @ token) * (up @ token)))
        outputs.append(total)
    return x + torch.stack(outputs)


@torch.no_grad()
def test_a_token_gets_its_two_likeliest_experts_by_their_shares(tiny_model):
    block = Adapter(tiny_model("llada-moe")).blocks[1]
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))  # (T, C)
    expected = by_hand(block, x)
    assert (block.module.add_mlp(x) - expected).abs().max() < 1e-5 < 0.1 < (expected - x).abs().max()
    assert (block.module.add_mlp(x[None]) - expected).abs().max() < 1e-5  # a batch of one sequence


@torch.no_grad()
def test_experts_see_every_token_twice_in_all(tiny_model):
    block = Adapter(tiny_model("llada-moe")).blocks[0]
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))  # (b, T, C)
    seen = [block.tokens(f"mlp_input.{expert}", x) for expert in range(6)]  # (m,) each
    assert torch.cat(seen).bincount(minlength=18).tolist() == [2] * 18
    assert all(torch.equal(tokens, tokens.sort().values) for tokens in seen)
    rows = block.read("activated.3", x, tokens=seen[3])  # (m, M)
    whole = block.read("activated.3", x)  # (b, T, M)
    assert rows.shape == (len(seen[3]), 16)
    assert torch.allclose(rows, whole.flatten(0, 1)[seen[3]], atol=1e-6)


def test_the_adapter_names_every_expert(tiny_model):
    (block, *_) = Adapter(tiny_model("llada-moe")).blocks
    assert block.widths == ExpertWidths(4, 4, 16, experts=6, shared=0)
    assert block.names["down.5"] == "model.layers.0.mlp.experts.5.down_proj"
    assert list(block.readers)[:3] == ["attention_input", "mixed", "mlp_input.0"]
    assert block.readers["mlp_input.4"] == ("gate.4", "up.4") and block.readers["activated.4"] == ("down.4",)
    assert (block.mlp_start, block.mlp_end) == ("mlp_input.0", "activated.5")
    assert len(block.names) == 4 + 3 * 6


def test_tokens_of_all_experts_are_those_of_each():
    chosen = torch.tensor([[2, 0], [0, 3], [3, 2], [2, 0]])  # (n, k): four tokens, two of five experts each
    seen = tokens_by_expert(chosen, 5)
    assert [tokens.tolist() for tokens, _ in seen] == [[0, 1, 3], [], [0, 2, 3], [1, 2], []]
    for number, pair in enumerate(seen):
        assert all(torch.equal(*each) for each in zip(pair, tokens_of(chosen, number)))
    assert all(len(tokens) == 0 for tokens, _ in tokens_by_expert(chosen[:0], 5))


def test_the_architecture_tells_llada_moe_from_llada(tiny_checkpoint):
    """Released checkpoints share LLaDA's model type."""
    names = [Adapter(load_model(tiny_checkpoint(family))).family.name for family in ("llada", "llada-moe")]
    assert names == ["llada", "llada-moe"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe_layer_freq": [1, 0, 1]}, "layers without experts"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok = 7 of num_experts = 6"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias = True is not supported"),
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
        ({"qk_layernorm": False}, "qk_layernorm = False is not supported"),
        ({"num_experts": 0}, "no positive integer 'num_experts'"),
    ],
)
def test_what_is_not_computed_is_refused(tiny_checkpoint, message, change_config, changes, said):
    assert said in message(change_config(tiny_checkpoint("llada-moe"), **changes))


@torch.no_grad()
def test_a_pass_without_data_sends_all_tokens_to_all_experts(tiny_model):
    """So that shapes can be traced where no router can choose."""
    model = tiny_model("llada-moe").to("meta")
    rows = []
    model.blocks[0].part("down.3").register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    assert model(torch.zeros(2, 5, dtype=torch.long, device="meta")).logits.shape == (2, 5, 2048)
    assert rows == [(10, 16)]


@pytest.mark.parametrize("compat", ["official", "uniform", "free"])
@pytest.mark.parametrize("kept", [12, 0])
@torch.no_grad()
def test_a_shared_expert_is_written_as_wide_as_it_is(tiny_checkpoint, tmp_path, compat, kept):
    """Of 12 channels, or cut off as a whole: the family's own key then says that there is none."""
    dense = load_model(tiny_checkpoint("llada-moe", shared_expert_intermediate_size=12))
    whole = identity_plan(Adapter(dense))
    blocks = tuple(replace(block, shared=block.shared[:kept]) for block in whole.blocks)
    model, ids = apply_plan(dense, replace(whole, blocks=blocks)), torch.arange(22).view(2, 11)
    out = save_pruned(model, tmp_path / "out", ExportSettings(compat=compat))
    written = json.loads((out / "config.json").read_text())["shared_expert_intermediate_size"]
    assert written == (kept or (0 if compat == "free" else None))
    assert_alike(load_model(out), model, ids)
    elsewhere = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert (elsewhere(ids).logits - model(ids).logits).abs().max() <= 1e-5
    elsewhere.save_pretrained(tmp_path / "again")
    assert_alike(load_model(tmp_path / "again"), model, ids)
