"""Broken checkpoints over every verb: one line that names what is wrong, and nothing written."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

VERBS = ("prune", "masks", "nm", "inspect", "inspect masks", "sinks", "eval", "bench")
UP = "model.transformer.blocks.1.up_proj.weight"
Break = Callable[[Path], object]


def config(**changes) -> Break:
    """Keys of config.json are changed; None removes one."""

    def change(model: Path) -> None:
        values = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(
            json.dumps({key: value for key, value in values.items() if value is not None})
        )

    return change


def text(name: str, content: str | bytes) -> Break:
    """A file is replaced."""
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def merged(name: str, **changes) -> Break:
    """Keys of another JSON file are changed."""

    def change(model: Path) -> None:
        values = json.loads((model / name).read_text(encoding="utf-8")) | changes
        (model / name).write_text(json.dumps(values), encoding="utf-8")

    return change


def replaced(name: str, make: Callable[[Path], object]) -> Break:
    """A file is removed, and something else made in its place."""

    def change(model: Path) -> None:
        (model / name).unlink()
        make(model / name)

    return change


def weights(edit: Callable[[dict], object]) -> Break:
    """The state dict is changed."""

    def change(model: Path) -> None:
        state = load_file(model / "model.safetensors")
        edit(state)
        save_file(state, model / "model.safetensors")

    return change


def header(**changes) -> Break:
    """The header's entry of one weight is changed, the rest of the file kept."""

    def change(model: Path) -> None:
        content = (model / "model.safetensors").read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8:end])
        entries[UP] |= changes
        new = json.dumps(entries).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + content[end:])

    return change


def cut(count: int) -> Break:
    """Weights end after `count` bytes."""
    return lambda model: os.truncate(model / "model.safetensors", count)


def dtype(kind: torch.dtype) -> Break:
    return weights(lambda state: state.update({UP: state[UP].to(kind)}))


def index(content) -> Break:
    """The weights are those an index names."""

    def change(model: Path) -> None:
        (model / "model.safetensors").rename(model / "one.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


EVERYWHERE: dict[str, tuple[Break, str]] = {  # what is broken, and what is said of it
    "kv heads as text": (config(n_kv_heads="4"), "n_kv_heads = '4' is not a whole number"),
    "kv heads negative": (config(n_kv_heads=-4), "n_kv_heads = -4 is not"),
    "kv heads a fraction": (config(n_kv_heads=4.0), "n_kv_heads = 4.0 is not"),
    "kv heads a list": (config(n_kv_heads=[]), "n_kv_heads = [] is not"),
    "kv heads true": (config(n_kv_heads=True), "n_kv_heads = True is not"),
    "kv heads 3 of 4": (config(n_kv_heads=3), "4 heads are not a multiple of 3"),
    "head size a fraction": (config(head_dim=8.5), "head_dim = 8.5 is not"),
    "head size odd": (config(head_dim=7), "head size 7 is odd"),
    "width huge": (config(d_model=2**31), "d_model = 2147483648 is not"),
    "width without": (config(d_model=None), "no positive integer 'd_model'"),
    "width infinite": (config(d_model=float("inf")), "no positive integer 'd_model'"),
    "depth huge": (config(n_layers=10**9), "n_layers = 1000000000 is not"),
    "depth beyond the weights": (config(n_layers=40), "the weights lack model.transformer.blocks.3."),
    "depth below the weights": (config(n_layers=1), "weights are not in the model config.json describes"),
    "depth zero": (config(n_layers=0), "no positive integer 'n_layers'"),
    "vocabulary huge": (config(vocab_size=10**12, embedding_size=10**12), "embedding_size = 1000000000000 is not"),
    "positions as text": (config(max_sequence_length="64"), "max_sequence_length = '64' is not"),
    "rope as text": (config(rope_theta="x"), "rope_theta = 'x' is not a number"),
    "rope not a number": (config(rope_theta=float("nan")), "rope_theta = nan is not a number"),
    "epsilon negative": (config(rms_norm_eps=-1.0), "rms_norm_eps = -1.0 is not a number"),
    "bias as text": (config(include_bias="no"), "include_bias = 'no' is not true or false"),
    "layers a list": (config(per_layer_config=[1]), "per_layer_config = [1] is not an object"),
    "layer unknown": (config(per_layer_config={"7": {}}), "per_layer_config.7 names none of the 3 blocks"),
    "mask id huge": (config(mask_token_id=10**20), "mask_token_id = 100000000000000000000 is not"),
    "mask id true": (config(mask_token_id=True), "mask_token_id = True is not"),
    "mask id outside": (config(mask_token_id=4000), "mask id 4000 lies outside"),
    "type a list": (config(model_type=["llada"]), "unknown model_type '['llada']'"),
    "type missing": (config(model_type=None), "unknown model_type ''"),
    "type long": (config(model_type="x" * 10**6), "unknown model_type 'xxx"),
    "architectures an object": (config(model_type="x", architectures={"a": 1}), "unknown model_type 'x'"),
    "a key of transformers": (config(use_return_dict=1), "config.json cannot be used ("),
    "norm unknown": (config(layer_norm_type=["rms"] * 10_000), "layer_norm_type = ['rms', 'rms',"),
    "config cut": (text("config.json", '{"model_type": "llada"'), "config.json is not valid JSON"),
    "config a list": (text("config.json", "[1, 2]"), "config.json holds [1, 2], not an object"),
    "config empty": (text("config.json", ""), "config.json is not valid JSON"),
    "config not utf-8": (text("config.json", b"\xff\xfe{}"), "config.json is not valid JSON"),
    "config nested": (text("config.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "is nested too deeply"),
    "config half a pair": (text("config.json", '{"model_type": "llada", "a": "\\ud800"}'), "is not valid JSON"),
    "config digits": (text("config.json", '{"a": ' + "9" * 5000 + "}"), "is not valid JSON (Exceeds the limit"),
    "config a pipe": (replaced("config.json", os.mkfifo), "config.json is a pipe or device, not a file"),
    "config a directory": (replaced("config.json", Path.mkdir), "config.json is a directory, not a file"),
    "config missing": (lambda model: (model / "config.json").unlink(), "config.json is missing"),
    "tokenizer a pipe": (replaced("tokenizer.json", os.mkfifo), "tokenizer.json is a pipe or device"),
    "tokenizer a list": (text("tokenizer.json", "[]"), "tokenizer.json holds [], not an object"),
    "tokenizer cut": (text("tokenizer.json", '{"model": '), "tokenizer.json is not valid JSON"),
    "settings a list": (text("tokenizer_config.json", "[]"), "tokenizer_config.json holds [], not an object"),
    "special tokens nested": (text("special_tokens_map.json", "[" * 10**5), "special_tokens_map.json is nested too"),
    "weights cut to nothing": (cut(0), "model.safetensors is cut short"),
    "weights cut in the length": (cut(5), "model.safetensors is cut short"),
    "weights cut in the header": (cut(100), "model.safetensors is cut short"),
    "weights cut": (cut(50_000), "model.safetensors is cut short"),
    "weights a pipe": (replaced("model.safetensors", os.mkfifo), "model.safetensors is a pipe or device"),
    "weights a directory": (replaced("model.safetensors", Path.mkdir), "model.safetensors is a directory"),
    "weights junk": (text("model.safetensors", os.urandom(1000)), "model.safetensors is cut short or not"),
    "weights of another shape": (weights(lambda s: s.update({UP: torch.zeros(3, 4)})), f"{UP} is (3, 4), but"),
    "weights fewer": (weights(lambda s: s.pop(UP)), f"the weights lack {UP}"),
    "weights more": (weights(lambda s: s.update(x=torch.zeros(1))), "1 weights are not in the model"),
    "int8": (dtype(torch.int8), f"'{UP}' is I8, but weights must be one of F32"),
    "bool": (dtype(torch.bool), f"'{UP}' is BOOL, but"),
    "complex": (dtype(torch.complex64), f"'{UP}' is C64, but"),
    "fp8": (dtype(torch.float8_e5m2), f"'{UP}' is F8_E5M2, but"),
    "int64": (dtype(torch.int64), f"'{UP}' is I64, but"),
    "header shape": (header(shape=[48, 33]), f"'{UP}' takes 6,144 bytes, but F32 of shape [48, 33] takes 6,336"),
    "header shape negative": (header(shape=[-48, -32]), "has shape = [-48, -32]"),
    "header dtype": (header(dtype="Q4"), "has dtype = 'Q4'"),
    "header place": (header(data_offsets=[0, 6144]), "share bytes: download it again"),
    "header place beyond": (header(data_offsets=[10**9, 10**9 + 6144]), "is cut short"),
    "header a list": (header(shape={"a": 1}), "has shape = {'a': 1}"),
    "index empty": (index({}), "names no shards"),
    "index of lists": (index({"weight_map": {"a": ["x"]}}), "names no shards"),
    "index outside": (index({"weight_map": {"a": "../one.safetensors"}}), "not a .safetensors file in its folder"),
    "index missing shard": (index({"weight_map": {"a": "two.safetensors"}}), "lacks two.safetensors"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_broken_checkpoint(place, refused, name, verb):
    change, said = EVERYWHERE[name]
    change(place / "model")
    assert said in refused(verb)
