"""Values in config.json and in headers that are of a wrong type, out of bounds, or not those of a model."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune import UserError, load_model
from structprune.config import ModelSettings
from structprune.models.headers import read_header
from structprune.models.loading import load_config
from structprune.runs.ghost import read_ghost

WRONG_VALUES = [  # changes of config.json, and what is said of them
    ({"n_kv_heads": "4"}, "n_kv_heads = '4' is not a whole number from 1 to 65536"),
    ({"n_kv_heads": -4}, "n_kv_heads = -4 is not"),
    ({"n_kv_heads": 4.0}, "n_kv_heads = 4.0 is not"),
    ({"n_kv_heads": []}, "n_kv_heads = [] is not"),
    ({"n_heads": True}, "no positive integer 'n_heads'"),
    ({"head_dim": 8.5}, "head_dim = 8.5 is not a whole number from 2 to 65536"),
    ({"head_dim": 7}, "the head size 7 is odd"),
    ({"d_model": 2**31}, "d_model = 2147483648 is not a whole number from 1 to 1048576"),
    ({"n_layers": 10**9}, "n_layers = 1000000000 is not a whole number from 1 to 1024"),
    ({"rope_theta": "big"}, "rope_theta = 'big' is not a number from 1 to 1e+12"),
    ({"rope_theta": float("nan")}, "rope_theta = nan is not a number"),
    ({"rms_norm_eps": -1}, "rms_norm_eps = -1 is not a number"),
    ({"include_bias": "false"}, "include_bias = 'false' is not true or false"),
    ({"rope_parameters": "x"}, "rope_parameters = 'x' is not an object"),
    ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta = 'x' is not a number"),
    ({"per_layer_config": {"9": {}}}, "per_layer_config.9 names none of the 3 blocks"),
    ({"per_layer_config": {"1": "x"}}, "per_layer_config.1 = 'x' is not an object"),
    ({"per_layer_config": {"1": {"n_heads": -1}}}, "per_layer_config.1.n_heads = -1 is not a whole number"),
    ({"per_layer_config": {"1": {"n_heads": 0}}}, "a block has 0 heads and 4 key/value heads: both must be 0 in a"),
    ({"per_layer_config": {"1": {"n_heads": 0, "n_kv_heads": 3}}}, "a block has 0 heads and 3 key/value heads: both"),
    ({"per_layer_config": {"1": {"n_kv_heads": 0}}}, "a block has 4 heads and 0 key/value heads: both must be 0"),
    ({"per_layer_config": {"1": {"n_heads": 0.0, "n_kv_heads": 0}}}, "per_layer_config.1.n_heads = 0.0 is not a whole"),
    ({"per_layer_config": dict.fromkeys("012", {"mlp_hidden_size": 0})}, "no block has an MLP, by per_layer_config"),
    ({"per_layer_config": dict.fromkeys("012", {"n_heads": 0, "n_kv_heads": 0})}, "no block has attention, by per_l"),
    ({"n_kv_heads": None, "per_layer_config": {"1": {"n_heads": 2}}}, "2 heads are not a multiple of 4 key/value"),
    ({"n_heads": 0}, "no positive integer 'n_heads'"),
    ({"mlp_hidden_size": 0}, "no positive integer 'mlp_hidden_size'"),
    ({"n_kv_heads": 0}, "n_kv_heads = 0 is not a whole number from 1"),
    ({"per_layer_config": {"1": {"heads": 1}}}, "per_layer_config.1 has the unknown key 'heads': give n_heads,"),
    ({"per_layer_config": {"1": {"n_kv_heads": 3}}}, "4 heads are not a multiple of 3 key/value heads"),
    ({"mask_token_id": 10**20}, "mask_token_id = 100000000000000000000 is not a whole number"),
    ({"use_return_dict": 1}, "config.json cannot be used ("),
]


@pytest.mark.parametrize("changes, said", WRONG_VALUES)
def test_every_value_that_is_used_has_a_type_and_bounds(tiny_checkpoint, changes, said, message, change_config):
    assert said in message(change_config(tiny_checkpoint("llada"), **changes))


NULLS = {
    "llada": ["n_kv_heads", "head_dim", "embedding_size", "max_sequence_length", "rope_theta", "rms_norm_eps",
              "include_bias", "weight_tying", "rope_scaling", "initializer_range"],
    "dream": ["num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps",
              "tie_word_embeddings", "rope_scaling", "use_sliding_window"],
}  # fmt: skip


@pytest.mark.parametrize("family", NULLS)
def test_null_is_the_default(tiny_checkpoint, change_config, family):
    """As in transformers' own configurations; `to_dict` must not take the place of a method."""
    directory = tiny_checkpoint(family)
    for key in NULLS[family]:
        default = load_config(change_config(directory, **{key: None}))[2]
        assert getattr(default, key, None) == getattr(type(default)(), key, None) or key in WIDTHS
    config = load_config(change_config(directory, to_dict=1, transformers_weights="../x"))[2]
    assert config.to_dict()["vocab_size"] == 2048 and "transformers_weights" not in config.to_dict()


WIDTHS = ("n_kv_heads", "num_key_value_heads", "head_dim", "embedding_size")  # defaults that follow other keys


def test_stored_rotary_tables_do_not_count(tiny_checkpoint, change_weights):
    directory = tiny_checkpoint("llada")
    change_weights(directory, lambda state: state.update({"model.inv_freq": torch.arange(4)}))
    assert load_model(directory).dtype == torch.float32
    assert read_ghost(directory, ModelSettings()).stored == torch.float32


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "merges.txt"])
def test_other_files_that_would_be_read_or_copied(tiny_checkpoint, message, name):
    directory = tiny_checkpoint("llada")
    os.mkfifo(directory / name)
    assert f"{name} is a pipe or device, not a file" in message(directory)
    (directory / name).unlink()
    with (directory / name).open("wb") as file:
        file.truncate(10**9)  # sparse
    assert f"{name} has 1,000,000,000 bytes, more than any such file" in message(directory)


def test_numbers_that_only_a_classifier_has_cost_nothing(tiny_checkpoint, change_config):
    """transformers makes a table of as many labels: here of 23 GB, for one number in a file."""
    directory = change_config(tiny_checkpoint("llada"), num_labels=10**9, label2id={"a": 0})
    assert load_config(directory)[2].num_labels == 2


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deeply to be read: download it again"),
        ('{"a": "\\ud800"}', "is not valid JSON ('utf-8' codec can't encode character"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON (Exceeds the limit"),
    ],
    ids=["nesting", "half a surrogate pair", "thousands of digits"],
)
def test_json_that_cannot_be_used_or_written_again(tmp_path, text, said, message):
    (tmp_path / "config.json").write_text(text)
    assert said in message(tmp_path)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tiny_checkpoint, message):
    directory = tiny_checkpoint("llada")
    for name in ("model.safetensors", "config.json"):
        (directory / name).unlink()
        os.mkfifo(directory / name)
        assert f"{name} is a pipe or device, not a file" in message(directory)


def test_an_index_left_over_from_a_sharded_save_does_not_count(tiny_checkpoint):
    """transformers reads model.safetensors first, and leaves the index and shards of an earlier save behind."""
    directory, old = tiny_checkpoint("llada"), tiny_checkpoint("llada", seed=1, name="old")
    places = dict.fromkeys(load_file(old / "model.safetensors"), "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    shutil.copyfile(old / "model.safetensors", directory / "model-00001-of-00001.safetensors")
    first = load_file(directory / "model.safetensors")["model.transformer.wte.weight"]
    assert torch.equal(load_model(directory).embedding.weight, first)
    (directory / "model-00001-of-00001.safetensors").unlink()
    assert torch.equal(load_model(directory).embedding.weight, first)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("pickle_it", [False, True])
def test_dtypes_that_are_no_weights_are_named(tiny_checkpoint, dtype, pickle_it, message, change_weights, pickled):
    directory, name = tiny_checkpoint("llada"), "model.transformer.blocks.1.up_proj.weight"
    change_weights(directory, lambda state: state.update({name: state[name].to(dtype)}))
    if pickle_it:
        pickled(directory)
    said = message(directory, allow_pickle=True)
    assert name in said and "but weights must be one of F32, BF16, F16, F64" in said


def test_a_quantised_checkpoint_is_called_one(tiny_checkpoint, message, change_config, change_weights):
    """bitsandbytes packs two weights of 4 bits into a byte, in another shape."""
    directory, name = tiny_checkpoint("llada"), "model.transformer.blocks.0.q_proj.weight"
    change_weights(directory, lambda state: state.update({name: torch.zeros(512, 1, dtype=torch.uint8)}))
    change_config(directory, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert f"'{name}' is U8, quantised with bitsandbytes, but weights" in message(directory)


def test_an_adapter_is_not_called_an_incomplete_download(tmp_path, message):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is a PEFT adapter, not a model: merge it into its base model first" in message(tmp_path)


HEADERS = [  # changes of one entry of a header, and what is said of them
    ({"shape": [2, -3]}, "has shape = [2, -3] for 'a'"),
    ({"shape": [2, True]}, "has shape = [2, True] for 'a'"),
    ({"shape": [2**40, 2**40]}, "has shape = [1099511627776, 1099511627776] for 'a'"),
    ({"shape": "6"}, "has shape = '6' for 'a'"),
    ({"shape": [2, 4]}, "'a' takes 24 bytes, but F32 of shape [2, 4] takes 32"),
    ({"dtype": "F33"}, "has dtype = 'F33' for 'a'"),
    ({"dtype": 32}, "has dtype = 32 for 'a'"),
    ({"dtype": "BF16"}, "'a' takes 24 bytes, but BF16 of shape [2, 3] takes 12"),
    ({"data_offsets": [0]}, "has data_offsets = [0] for 'a'"),
    ({"data_offsets": [8, 32]}, "'a' and 'b' share bytes"),
    ({"data_offsets": [4096, 4120]}, "is cut short or not a safetensors file"),
]


@pytest.mark.parametrize("changes, said", HEADERS)
def test_a_header_that_contradicts_itself(tmp_path, changes, said):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(2)}, path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["a"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    with pytest.raises(UserError, match=re.escape(said)):
        read_header(path)
