"""GGUF files: read back, every weight is there; and which models llama.cpp could not read."""

import json
import shutil
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from structprune import UserError, load_model
from structprune.assets import model_directory
from structprune.checkpoint.gguf_file import check_gguf, interleaved, write_gguf
from structprune.checkpoint.gguf_tokens import Vocabulary
from structprune.models.families import FAMILIES, family_of
from structprune.models.rotary_structprune import rotary_tables, rotate

PLACES = {
    "llada": {
        "token_embd": "model.transformer.wte", "output": "model.transformer.ff_out", "attn_q": "q_proj",
        "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "attn_out", "ffn_gate": "ff_proj", "ffn_up": "up_proj",
        "ffn_down": "ff_out", "attn_norm": "attn_norm", "ffn_norm": "ff_norm",
    },
    "dream": {
        "token_embd": "model.embed_tokens", "output": "lm_head", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    },
}  # fmt: skip
DREAM = {"num_attention_heads": 4, "num_key_value_heads": 2}  # heads that share out the hidden size


def read(path) -> tuple[dict, dict[str, np.ndarray], dict]:
    """Values, tensors as fp32, and their types."""
    reader = gguf.GGUFReader(path)
    tensors = {each.name: gguf.dequantize(each.data, each.tensor_type) for each in reader.tensors}
    types = {each.name: each.tensor_type.name for each in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors, types


def test_rows_of_a_head_become_neighbours():
    """Two heads of 4 rows: 0 1 2 3 | 4 5 6 7."""
    weight = torch.arange(8.0)[:, None]
    assert interleaved(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved(weight[:, 0], 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_turning_neighbours_gives_the_same_attention():
    """Rotary positions over pairs (2 i, 2 i + 1) of moved rows are those over (i, i + D / 2)."""
    size, positions = 8, torch.arange(5)[None]
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(0))  # (T, D)
    cos, sin = rotary_tables(positions, size, 100.0)
    ours = rotate(x[None, None], cos, sin)[0, 0]  # (T, D)
    moved = interleaved(x.T.contiguous(), 1).T  # (T, D)
    angles = positions[0][:, None] / 100.0 ** (torch.arange(0, size, 2) / size)  # (T, D / 2)
    one, other = moved[:, 0::2], moved[:, 1::2]  # (T, D / 2)
    theirs = torch.stack((one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()), -1)
    assert torch.allclose(theirs.flatten(1), interleaved(ours.T.contiguous(), 1).T, atol=1e-6)


@pytest.mark.parametrize("family, changes", [("llada", {}), ("mmada", {"n_heads": 2, "n_kv_heads": 1, "head_dim": 12}),
                                             ("dream", DREAM)])  # fmt: skip
def test_read_back_every_weight_is_there(tiny_checkpoint, tmp_path, family, changes):
    model = load_model(tiny_checkpoint(family, **changes))
    path = write_gguf(model, tmp_path / "model.gguf")
    values, tensors, types = read(path)
    arch, state = {"mmada": "llada"}.get(family, family), model.state_dict()
    assert values["general.architecture"] == arch and values["general.file_type"] == 0
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    size = model.config.head_dim
    sizes = {
        "block_count": 3, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48,
        "attention.head_count": heads, "attention.head_count_kv": kv_heads, "attention.key_length": size,
        "attention.value_length": size, "rope.dimension_count": size, "rope.freq_base": 10000.0, "vocab_size": 2048,
        "attention.causal": False,
    }  # fmt: skip
    assert {key: values[f"{arch}.{key}"] for key in sizes} == sizes
    assert values["diffusion.shift_logits"] is (family == "dream")
    for name, place in PLACES[arch].items():
        whole = name in ("token_embd", "output")
        for index in [None] if whole else range(3):
            own = place if whole else f"{family_of(model.config).blocks}.{index}.{place}"
            weight = state.pop(f"{own}.weight")
            if arch == "llada" and name in ("attn_q", "attn_k"):
                weight = interleaved(weight, heads if name == "attn_q" else kv_heads)
            stored = tensors.pop(f"{name}.weight" if whole else f"blk.{index}.{name}.weight")
            assert np.array_equal(stored, weight.numpy()), name
    biases = {name for name in tensors if name.endswith("bias")}
    assert len(biases) == (9 if arch == "dream" else 0) and set(tensors) - biases == {"output_norm.weight"}
    assert all(np.array_equal(tensors[name], state[_own(name)].numpy()) for name in biases)
    assert set(types.values()) == {"F32"}


def _own(name: str) -> str:
    """The state-dict name of Dream's bias blk.1.attn_q.bias."""
    _, index, part, _ = name.split(".")
    return f"model.layers.{index}.{PLACES['dream'][part]}.bias"


def test_the_tokenizer_is_that_of_the_checkpoint(tiny_checkpoint, tmp_path):
    model = load_model(tiny_checkpoint())
    model.resize_token_embeddings(2050)
    values, _, _ = read(write_gguf(model, tmp_path / "model.gguf"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_directory())
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == 2050 and tokens[2048:] == ["[PAD2048]", "[PAD2049]"]
    assert tokens[:2048] == tokenizer.convert_ids_to_tokens(range(2048))
    named = gguf.TokenType
    assert kinds == [named.NORMAL] * 2046 + [named.CONTROL] * 2 + [named.UNUSED] * 2
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.mask_token_id"] == 2047 and values["tokenizer.ggml.eos_token_id"] == 2046
    merges = json.loads((model_directory() / "tokenizer.json").read_text())["model"]["merges"]
    assert values["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize("kind, number", [("f16", 1), ("bf16", 32), ("q8_0", 7)])
def test_half_precision_and_eight_bits(tiny_checkpoint, tmp_path, kind, number):
    """Rows of `down` are 48 weights, no multiple of the 32 that share a scale: they are f16."""
    model = load_model(tiny_checkpoint(mlp_hidden_size=48))
    values, tensors, types = read(write_gguf(model, tmp_path / "model.gguf", kind))
    assert values["general.file_type"] == number
    assert types["blk.0.attn_norm.weight"] == "F32" and types["blk.0.ffn_up.weight"] == kind.upper()
    assert types["blk.0.ffn_down.weight"] == ("F16" if kind == "q8_0" else kind.upper())
    weight = model.blocks[0].part("up").weight.detach()  # (O, C)
    error = np.abs(tensors["blk.0.ffn_up.weight"] - weight.numpy())
    step = weight.abs().amax(-1, keepdim=True).numpy() / 127
    limits = {"f16": 2.0**-11, "bf16": 2.0**-8}
    limit = step * (0.5 + 127 * 2.0**-11) + 1e-8 if kind == "q8_0" else np.abs(weight.numpy()) * limits[kind] + 1e-8
    assert (error <= limit).all() and error.max() > 0


def test_the_sources_dtype_is_kept(tiny_checkpoint, tmp_path):
    model = load_model(tiny_checkpoint(torch_dtype="bfloat16"))
    _, tensors, types = read(write_gguf(model, tmp_path / "model.gguf"))
    assert types["blk.2.ffn_up.weight"] == "BF16" and np.array_equal(
        tensors["blk.2.ffn_up.weight"], model.blocks[2].part("up").weight.detach().numpy()
    )


@pytest.mark.parametrize("family, changes, reason", [
    ("dream", {"num_attention_heads": 3, "num_key_value_heads": 1}, "heads were removed: 3 heads of 8 are not "),
    ("dream", DREAM | {"per_layer_config": {"1": {"intermediate_size": 8}}}, "its blocks differ in width"),
    ("llada", {"per_layer_config": {"1": {"mlp_hidden_size": 8}}}, "its blocks differ in width"),
    ("llada", {"attention_output_bias": True}, "the refit added biases"),
    ("llada", {"include_qkv_bias": True}, "its linears have biases"),
])  # fmt: skip
def test_what_llama_cpp_cannot_read(tiny_model, family, changes, reason):
    config = tiny_model(family, **changes).config
    with pytest.raises(UserError, match=f"^llama.cpp reads a {family} of class .*, and this is none: {reason}"):
        check_gguf(config, None)


def test_another_family_is_refused(tiny_model, monkeypatch):
    families = [replace(family, gguf=None) if family.name == "dream" else family for family in FAMILIES]
    for module in ("structprune.models.families", "structprune.checkpoint.gguf_file"):
        monkeypatch.setattr(f"{module}.FAMILIES", families)
    with pytest.raises(UserError, match="--gguf is for llada, whose loaders llama.cpp has: this is dream"):
        check_gguf(tiny_model("dream").config, None)


def test_without_the_package(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"--gguf needs the package gguf: pip install 'structprune\[gguf\]'"):
        write_gguf(load_model(tiny_checkpoint()), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_failure_leaves_no_file(tiny_checkpoint, tmp_path, monkeypatch):
    source = tiny_checkpoint()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *given: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="no space left while writing"):
        write_gguf(load_model(source), tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]


def test_splits_are_told_apart_by_what_they_do(tiny_checkpoint, tmp_path):
    """A Qwen2 tokenizer takes numbers apart; pairs of digits are none of llama.cpp's."""
    directory = tiny_checkpoint()
    assert Vocabulary(directory, 2048).split == "gpt-2"
    whole = json.loads((directory / "tokenizer.json").read_text())
    Qwen2Tokenizer(vocab=whole["model"]["vocab"], merges=[]).save_pretrained(tmp_path / "qwen")
    assert Vocabulary(tmp_path / "qwen", 4096).split == "qwen2"
    odd = shutil.copytree(directory, tmp_path / "odd")
    plain, digits = whole["pre_tokenizer"], {"type": "Digits", "individual_digits": True}
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, plain]}
    (odd / "tokenizer.json").write_text(json.dumps(whole))
    assert Vocabulary(odd, 2048).split == "smollm"
    pairs = {"type": "Split", "pattern": {"Regex": "\\p{N}{2}"}, "behavior": "Isolated", "invert": False}
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pairs, plain]}
    (odd / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(
        UserError, match="splits text like none of gpt-2, qwen2, llama-bpe, .*: name .* with --gguf-pre"
    ):
        Vocabulary(odd, 2048)
    assert Vocabulary(odd, 2048, "my-own").split == "my-own"
    whole["pre_tokenizer"] = {"type": "Whitespace"}
    (odd / "tokenizer.json").write_text(json.dumps(whole))
    for split in (None, "my-own"):
        with pytest.raises(UserError, match="the tokenizer is not byte-level BPE, which --gguf needs"):
            Vocabulary(odd, 2048, split)


def test_tokens_without_a_row(tiny_checkpoint):
    with pytest.raises(UserError, match="token 2047 has no row in the embedding of 2000"):
        Vocabulary(tiny_checkpoint(), 2000)
