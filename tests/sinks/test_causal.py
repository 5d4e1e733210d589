"""Causal language models: their attention against eager weights, token by token, in memory that knows no T²."""

import pytest
import torch

from structprune.assets import model_directory
from structprune.errors import UserError
from structprune.models.tokenizer import load_tokenizer
from structprune.sinks import causal
from structprune.sinks.causal import CausalMeter, gguf_file, is_causal, load_causal, read_causal
from structprune.sinks.diagnostics import per_query
from structprune.sinks.trajectory import UNSEEN
from structprune.statistics import sinks

CPU, PLAIN = torch.device("cpu"), lambda items, title: items


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@torch.no_grad()
def test_generation_against_eager_weights(kind, causal_checkpoint):
    folder = causal_checkpoint(kind)
    model = load_causal(folder, None, CPU)
    prompts = torch.randint(0, 2000, (2, 14), generator=torch.Generator().manual_seed(0))
    result = causal.generation_trajectory(model, prompts, 3, PLAIN)
    from transformers import AutoModelForCausalLM

    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for step in range(3):
        ids = result.ids[:, step, : 14 + step]
        output = eager(ids, output_attentions=True)
        mass = torch.stack(output.attentions).sum((0, 2, 3))  # (N, t) over layers, heads and queries
        seen = 14 + step - UNSEEN + 1
        assert torch.allclose(result.mass[:, step, :seen], per_query(mass)[:, :seen], rtol=1e-3)
        if step < 2:
            assert torch.equal(result.ids[:, step + 1, 14 + step], output.logits[:, -1].argmax(-1))  # greedy
    assert result.common.sum() == 14 - UNSEEN + 1 and result.prompt == 14 and result.heads == 12


def test_a_checkpoints_own_way_to_generate_is_left_aside(causal_checkpoint):
    from transformers import GenerationConfig

    model, prompts = load_causal(causal_checkpoint(), None, CPU), torch.arange(12)[None]
    plain = causal.generation_trajectory(model, prompts, 6, PLAIN).ids
    first = plain[0, 1, 12].item()
    for own in ({"eos_token_id": first}, {"suppress_tokens": [first]}):
        model.generation_config = GenerationConfig(**own)
        assert torch.equal(causal.generation_trajectory(model, prompts, 6, PLAIN).ids, plain)


@pytest.mark.filterwarnings("ignore:`past_key_values`")  # as it is called before transformers 5.40
@torch.no_grad()
def test_meter_adds_up_what_a_cache_leaves_out(causal_checkpoint):
    model = load_causal(causal_checkpoint(), None, CPU)
    ids = torch.randint(0, 2000, (2, 9), generator=torch.Generator().manual_seed(0))
    with CausalMeter().on() as whole:
        model(ids)
    with CausalMeter().on() as parts:
        cache = model(ids[:, :6], use_cache=True).past_key_values
        model(ids[:, 6:], past_key_values=cache, use_cache=True)
    assert len(whole.layers) == 3
    for one, other in zip(whole.layers, parts.layers):
        assert torch.allclose(one, other, atol=1e-4) and torch.allclose(one.sum(-1), torch.full((2, 4), 9.0))
    model(ids)  # closed: nothing is taken in
    assert parts.layers[0].sum() == pytest.approx(2 * 4 * 9, rel=1e-4)


@torch.no_grad()
def test_no_tensor_grows_with_the_square_of_the_length(causal_checkpoint, largest, monkeypatch):
    monkeypatch.setitem(sinks.TILE_BYTES, "cpu", 2**15)
    model = load_causal(causal_checkpoint(max_position_embeddings=512, num_hidden_layers=1), None, CPU)
    ids = torch.zeros(1, 512, dtype=torch.long)
    with largest() as plain:
        model(ids, logits_to_keep=1)
    with CausalMeter().on(), largest() as metered:
        model(ids, logits_to_keep=1)
    assert metered.size <= max(plain.size, 2 * 2**15) < 512**2


def test_kinds_of_files(tmp_path, causal_checkpoint, tiny_checkpoint):
    assert is_causal(causal_checkpoint()) and not is_causal(tiny_checkpoint())
    folder = tmp_path / "quantised"
    folder.mkdir()
    (folder / "a.gguf").touch()
    assert is_causal(folder) and gguf_file(folder) == gguf_file(folder / "a.gguf") == "a.gguf"
    (folder / "b.gguf").touch()
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\): name the one"):
        gguf_file(folder)
    (folder / "model.safetensors").touch()
    assert gguf_file(folder) is None


def test_what_cannot_be_read_is_one_line(tmp_path, causal_checkpoint):
    folder = causal_checkpoint()
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a causal language model"):
        load_causal(folder, None, CPU)


def test_a_model_with_attention_of_its_own_is_refused(causal_checkpoint):
    model = load_causal(causal_checkpoint(), None, CPU)
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="LlamaForCausalLM does not use transformers' attention interface"):
        causal.generation_trajectory(model, torch.zeros(1, 9, dtype=torch.long), 2, PLAIN)


WINDOWS = {
    "Qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "Mistral": {"sliding_window": 12},
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_sliding_window_shorter_than_the_run_is_refused(kind, causal_checkpoint):
    model = load_causal(causal_checkpoint(kind, **WINDOWS[kind]), None, CPU)
    result = causal.generation_trajectory(model, torch.arange(9)[None], 3, PLAIN)  # 12 tokens: nothing drops out
    assert result.mass.shape == (1, 3, 11)
    with pytest.raises(
        UserError, match=f"{kind}ForCausalLM attends within a sliding window of 12 .* the 13 of the run"
    ):
        causal.generation_trajectory(model, torch.arange(10)[None], 3, PLAIN)
    off = {"Qwen2": {"use_sliding_window": False}, "Mistral": {"sliding_window": None}}[kind]
    model = load_causal(causal_checkpoint(kind, **(WINDOWS[kind] | off)), None, CPU)
    assert causal.generation_trajectory(model, torch.arange(13)[None], 3, PLAIN).mass.shape == (1, 3, 15)


def test_an_encoder_is_no_causal_model(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    for decoder in (True, False):
        folder = tmp_path / str(decoder)
        BertLMHeadModel(BertConfig(num_hidden_layers=1, is_decoder=decoder, **sizes)).save_pretrained(folder)
    assert load_causal(tmp_path / "True", None, CPU) is not None
    with pytest.raises(UserError, match="positions of BertLMHeadModel attend to later ones; give a decoder"):
        load_causal(tmp_path / "False", None, CPU)
    with pytest.raises(UserError, match="positions of bert attend to later ones"):
        read_causal(tmp_path / "False")  # before weights are read
    load_tokenizer(model_directory()).save_pretrained(tmp_path / "True")
    assert read_causal(tmp_path / "True")[0].is_decoder


def test_the_window_is_that_of_layers_that_have_one():
    from transformers import PreTrainedConfig

    kinds = ["full_attention", "sliding_attention"]
    cases = [
        ({}, None),
        ({"sliding_window": 7}, 7),
        ({"sliding_window": 7, "use_sliding_window": False}, None),
        ({"sliding_window": 7, "layer_types": kinds[:1]}, None),
        ({"sliding_window": 7, "layer_types": kinds, "attention_chunk_size": 5}, 7),
        ({"attention_chunk_size": 5, "layer_types": ["chunked_attention"]}, 5),
    ]
    for values, window in cases:
        assert causal.sliding_window(PreTrainedConfig(**values)) == window, values
