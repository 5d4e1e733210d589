"""Every way a checkpoint can be broken: one line that names what is wrong."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from structprune import UserError, load_model
from structprune.models.checkpoint_files import shard_names
from structprune.models.headers import read_header

HEAD = {"llada": "model.transformer.ff_out.weight", "dream": "lm_head.weight"}


def test_missing_directory(tmp_path, message):
    assert "no checkpoint directory at" in message(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "no checkpoint directory at" in message(tmp_path / "file")


def test_directory_without_config(tmp_path, message):
    assert "config.json is missing" in message(tmp_path)


@pytest.mark.parametrize(
    "text, said", [("{", "not valid JSON"), ("[1]", r"holds [1], not an object"), ("", "not valid JSON")]
)
def test_config_that_is_no_object(tmp_path, text, said, message):
    (tmp_path / "config.json").write_text(text)
    assert said in message(tmp_path)


def test_half_downloaded_names_the_shard(tiny_checkpoint, message):
    directory = tiny_checkpoint("llada")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    said = message(directory)
    assert "model-00002-of-00002.safetensors" in said and "finish the download" in said
    assert "model-00001-of-00002" not in said


def test_shard_without_its_index(tiny_checkpoint, message):
    directory = tiny_checkpoint("llada")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    assert "model-00001-of-00002.safetensors but neither" in message(directory)


def test_index_that_names_nothing(tiny_checkpoint, message):
    directory = tiny_checkpoint("llada")
    (directory / "model.safetensors.index.json").write_text("{}")
    (directory / "model.safetensors").unlink()
    assert "model.safetensors.index.json names no shards" in message(directory)


def test_no_weights_at_all(tiny_checkpoint, message):
    directory = tiny_checkpoint("llada")
    (directory / "model.safetensors").unlink()
    assert "has no weights" in message(directory)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_shard(tiny_checkpoint, keep, message):
    directory = tiny_checkpoint("llada")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors is cut short" in message(directory)


@pytest.mark.parametrize("content", [b"\x02" + b"\0" * 7 + b"[]", b"\x0a" + b"\0" * 7 + b'{"a": [1]}', b"x" * 64])
def test_file_that_is_no_safetensors(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a safetensors file|has shape = None for 'a'"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_or_inf_names_shard_and_tensor(tiny_checkpoint, value, message, change_weights):
    name = "model.transformer.blocks.1.up_proj.weight"
    directory = change_weights(tiny_checkpoint("llada"), lambda state: state[name].view(-1)[3:4].fill_(value))
    said = message(directory)
    assert "model.safetensors" in said and name in said and "NaN or Inf" in said


def test_unknown_model_type_names_what_is_supported(tiny_checkpoint, message, change_config):
    said = message(change_config(tiny_checkpoint("llada"), model_type="lladda"))
    assert "unknown model_type 'lladda'" in said and "did you mean 'llada'?" in said
    assert all(name in said for name in ("llada", "mmada", "Dream"))


@pytest.mark.parametrize("family, changes, name", [
    ("llada", {"mlp_hidden_size": 56}, "ff_proj.weight"), ("llada", {"n_kv_heads": 2}, "k_proj.weight"),
    ("dream", {"intermediate_size": 40}, "gate_proj.weight"), ("dream", {"num_key_value_heads": 3}, "k_proj.weight"),
    ("dream", {"vocab_size": 2049}, "embed_tokens.weight"),
])  # fmt: skip
def test_shapes_that_do_not_fit_the_config(tiny_checkpoint, family, changes, name, message, change_config):
    said = message(change_config(tiny_checkpoint(family), **changes))
    assert name in said and "but config.json asks for" in said


def test_more_blocks_than_weights_and_more_weights_than_blocks(tiny_checkpoint, message, change_config):
    assert "the weights lack model.layers.3." in message(change_config(tiny_checkpoint("dream"), num_hidden_layers=4))
    said = message(change_config(tiny_checkpoint("llada"), n_layers=2))
    assert "weights are not in the model" in said and "model.transformer.blocks.2." in said


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_missing_tensor_is_named(tiny_checkpoint, family, message, change_weights):
    directory = change_weights(tiny_checkpoint(family), lambda state: state.pop(HEAD[family]))
    assert f"the weights lack {HEAD[family]}" in message(directory)


@pytest.mark.parametrize("family, changes, said", [
    ("llada", {"n_heads": None}, "no positive integer 'n_heads'"), ("llada", {"n_heads": 5}, "not a multiple of 5"),
    ("llada", {"n_layers": "3"}, "no positive integer 'n_layers'"), ("llada", {"n_heads": 0}, "no positive integer"),
    ("llada", {"n_kv_heads": 3}, "4 heads are not a multiple of 3"), ("llada", {"block_type": "sequential"}, "block_"),
    ("llada", {"weight_tying": True}, "weight_tying = True"), ("llada", {"alibi": True}, "alibi = True"),
    ("llada", {"activation_type": "swiglu"}, "activation_type"),
    ("llada", {"rope_full_precision": False}, "rope_full_precision"),
    ("dream", {"tie_word_embeddings": True}, "tie_word_embeddings"), ("dream", {"hidden_act": "gelu"}, "hidden_act"),
    ("dream", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ("dream", {"use_sliding_window": True}, "use_sliding_window"),
])  # fmt: skip
def test_config_that_is_not_computed(tiny_checkpoint, family, changes, said, message, change_config):
    assert said in message(change_config(tiny_checkpoint(family), **changes))


@pytest.mark.parametrize("mask", [2048, -1])
def test_mask_id_beyond_the_embedding(tiny_checkpoint, mask, message, change_config):
    directory = tiny_checkpoint("llada")
    assert f"mask id {mask} lies outside the embedding of 2048 tokens" in message(directory, mask_id=mask)
    refused = "mask id 2048 lies outside" if mask > 0 else "mask_token_id = -1 is not a whole number from 0 to"
    assert refused in message(change_config(directory, mask_token_id=mask))


def test_pickled_weights_are_refused_unless_allowed(tiny_checkpoint, message, pickled):
    directory = tiny_checkpoint("llada")
    state = load_file(directory / "model.safetensors")
    said = message(pickled(directory))
    assert "only pickled weights (pytorch_model.bin)" in said and "--allow-pickle" in said
    model = load_model(directory, allow_pickle=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_safetensors_win_over_pickles(tiny_checkpoint):
    directory = tiny_checkpoint("llada")
    (directory / "pytorch_model.bin").write_bytes(b"not read")
    assert shard_names(directory, allow_pickle=True) == ["model.safetensors"]
    load_model(directory, allow_pickle=True)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_allowed_pickles_hold_weights_only(tiny_checkpoint, tmp_path, message, pickled):
    directory, mark = pickled(tiny_checkpoint("llada")), tmp_path / "executed"
    torch.save({"weight": Bomb(mark)}, directory / "pytorch_model.bin", pickle_module=pickle)
    assert "holds more than weights" in message(directory, allow_pickle=True)
    assert not mark.exists()
    torch.save([torch.zeros(1)], directory / "pytorch_model.bin")
    assert "not a state dict" in message(directory, allow_pickle=True)
    (directory / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    assert "pytorch_model.bin is cut short" in message(directory, allow_pickle=True)


def test_half_downloaded_pickles_name_the_shard(tiny_checkpoint, message, pickled):
    directory = pickled(tiny_checkpoint("llada"))
    (directory / "pytorch_model.bin").rename(directory / "pytorch_model-00001-of-00002.bin")
    places = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert "lacks pytorch_model-00002-of-00002.bin" in message(directory, allow_pickle=True)


def test_a_shard_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match="is a directory, not a file"):
        read_header(tmp_path / "model.safetensors")
