"""scripts/studies/causal_layout.py: the converted model is the source under a causal mask; the mask token is free."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from structprune import UserError, load_model, load_tokenizer
from structprune.assets import model_directory

ROWS = 2048  # of the embedded tokenizer, whose last token is its mask token
SOURCES = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {"rms_norm_eps": 1e-3}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "llama, without groups": ("llama", {"num_key_value_heads": 4}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, untied": ("qwen2", {"rope_theta": 1e6}),
}


@pytest.fixture
def layout(scripts):
    return scripts("causal_layout")


@pytest.fixture
def tokenizer():
    return load_tokenizer(model_directory())


@pytest.fixture
def convert(layout):
    """`convert(directory, mask)` -> the converted model and its config.json."""

    def run(directory, mask):
        causal = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        layout.check_source(causal.config, directory)
        values = layout.dream_values(causal.config, mask, load_tokenizer(directory), torch.float32)
        return layout.build_dream(causal, values, directory), values

    return run


@pytest.mark.parametrize("rows", [ROWS, ROWS + 3])
@pytest.mark.parametrize("name", SOURCES)
def test_logits_under_a_causal_mask_are_the_sources(layout, causal_source, convert, name, rows, tmp_path):
    kind, changes = SOURCES[name]
    directory = causal_source(kind, **changes)
    model, values = convert(directory, layout.MaskToken("<|mask|>", rows - 1, rows))
    layout.write_dream(model, values, directory, tmp_path)
    ids = torch.randint(ROWS, (2, 24), generator=torch.Generator().manual_seed(1))  # (B, T)
    causal_mask = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]  # (1, 1, T, T)
    with torch.inference_mode():
        source = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        expected = source(ids).logits  # (B, T, V)
        for dream in (model, load_model(tmp_path)):
            logits = dream.output_head(dream.encode(ids, causal_mask))  # (B, T, rows)
            assert logits.shape[-1] == rows
            assert (logits[..., :ROWS] - expected).abs().max() < 1e-4 and expected.std() > 0.5
            assert (dream(ids).logits[..., :ROWS] - expected).abs().max() > 0.1  # attention to all positions
    assert values["vocab_size"] == rows and values["mask_token_id"] == rows - 1 and values["model_type"] == "Dream"
    assert values.get("head_dim") == changes.get("head_dim") and not values["tie_word_embeddings"]


def test_new_rows_are_the_mean_and_the_head_is_no_view_of_the_embedding(layout, causal_source, convert):
    directory = causal_source("llama", tie_word_embeddings=True)
    model, _ = convert(directory, layout.MaskToken("<|mask|>", ROWS, ROWS + 1))
    for weight in (model.embedding.weight, model.output_head.weight):
        assert torch.allclose(weight[ROWS], weight[:ROWS].mean(0), atol=1e-6)
    model, _ = convert(directory, layout.MaskToken("<|mask|>", 5, ROWS))
    model.embedding.weight[5] = 7.0
    assert not (model.output_head.weight[5] == 7.0).any()


def test_a_bias_without_a_place_is_refused_unless_it_is_zero(layout, causal_source, convert):
    directory = causal_source("llama", attention_bias=True)
    with pytest.raises(UserError, match=r"has model\.layers\.0\.self_attn\.o_proj\.bias, but Dream's layout no such"):
        convert(directory, layout.MaskToken("<|mask|>", 5, ROWS))
    state = load_file(directory / "model.safetensors")
    state |= {name: torch.zeros_like(value) for name, value in state.items() if name.endswith("o_proj.bias")}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    model, _ = convert(directory, layout.MaskToken("<|mask|>", 5, ROWS))
    name = "model.layers.1.self_attn.k_proj.bias"
    assert torch.equal(model.state_dict()[name], state[name]) and state[name].abs().min() > 0


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "type = 'linear'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "windows of 16"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ("mistral", {}, "model type 'mistral'"),
    ],
)  # fmt: skip
def test_what_dream_cannot_compute_is_refused_by_name(layout, kind, changes, words):
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, num_hidden_layers=2, **changes)
    with pytest.raises(UserError) as error:
        layout.check_source(config, "SOURCE")
    assert words in str(error.value) and str(error.value).startswith("SOURCE ")


def test_windows_of_no_layer_are_no_obstacle(layout):
    from transformers import AutoConfig

    options = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "num_hidden_layers": 2}
    layout.check_source(AutoConfig.for_model("qwen2", **options), "SOURCE")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rope.scaling.type", "none", None),
        ("rope.scaling.type", "yarn", "llama.rope.scaling.type = 'yarn'"),
        ("rope.scaling.factor", 4.0, "llama.rope.scaling.factor = 4.0"),
        ("attention.sliding_window", 512, "llama.attention.sliding_window = 512"),
        ("rope_freqs", [1.0, 1.0], None),
        ("rope_freqs", [1.0, 8.0], "scaled rotary positions (rope_freqs)"),
    ],
)
def test_what_transformers_passes_over_in_a_gguf_file_is_refused(layout, tmp_path, key, value, words):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    if isinstance(value, list):
        writer.add_tensor("rope_freqs.weight", torch.tensor(value).numpy())
    else:
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"llama.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if words is None:
        return layout.check_gguf(tmp_path / "m.gguf")
    with pytest.raises(UserError) as error:
        layout.check_gguf(tmp_path / "m.gguf")
    assert words in str(error.value) and str(tmp_path / "m.gguf") in str(error.value)


def test_the_mask_token_is_the_tokenizers_else_a_reserved_one_else_new(layout, tokenizer):
    assert layout.choose_mask(tokenizer, ROWS) == layout.MaskToken("<|mdm_mask|>", ROWS - 1, ROWS)
    tokenizer.mask_token = None
    new = layout.choose_mask(tokenizer, ROWS)
    assert new == layout.MaskToken("<|mask|>", ROWS, ROWS + 1) and tokenizer.mask_token_id == ROWS
    assert new.where(ROWS) == f"id {ROWS}, a new row"
    assert layout.choose_mask(tokenizer, ROWS + 5) == layout.MaskToken("<|mask|>", ROWS, ROWS + 5)  # a spare row


def test_a_reserved_token_in_use_is_passed_over(layout, tokenizer):
    tokenizer.mask_token = None
    names = [f"<|reserved_special_token_{index}|>" for index in range(3)]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.pad_token, tokenizer.chat_template = names[0], f"{names[1]}{{{{ messages }}}}"
    assert layout.choose_mask(tokenizer, ROWS + 3) == layout.MaskToken(names[2], ROWS + 2, ROWS + 3)


def test_a_mask_token_that_is_given_must_be_free(layout, tokenizer):
    tokenizer.mask_token = None
    tokenizer.chat_template = "<|chat|>{{ messages }}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|chat|>", "<|free|>"]})
    for text, words in {
        "<|fre|>": "'<|fre|>' is not in the vocabulary (did you mean '<|free|>'?): choose one of",
        "e": "'e' is an ordinary token",
        "<|endoftext|>": "'<|endoftext|>' is the tokenizer's pad_token",
        "<|chat|>": "'<|chat|>' is in the chat template",
    }.items():
        with pytest.raises(UserError) as error:
            layout.choose_mask(tokenizer, ROWS + 2, text)
        assert words in str(error.value)
    assert layout.choose_mask(tokenizer, ROWS + 2, "<|free|>") == layout.MaskToken("<|free|>", ROWS + 1, ROWS + 2)


def test_tokens_without_a_row_are_refused(layout, tokenizer):
    with pytest.raises(UserError, match="up to id 2047, but the embedding only 2000 rows"):
        layout.choose_mask(tokenizer, 2000)
