"""Broken causal language models, which `structprune sinks` reads by transformers' own classes: one line for each."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from structprune.assets import model_directory
from structprune.models.tokenizer import load_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama's directory."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, max_position_embeddings=64, **SIZES)).save_pretrained(folder)
    load_tokenizer(model_directory()).save_pretrained(folder)
    return folder


def edit(name: str, change):
    """Change the values of a JSON file, or the state dict."""

    def apply(folder) -> None:
        path = folder / name
        values = json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
        change(values)
        path.write_text(json.dumps(values)) if path.suffix == ".json" else save_file(values, path, {"format": "pt"})

    return apply


WEIGHT = "model.layers.0.mlp.up_proj.weight"
BROKEN = {
    "weight missing": (
        edit("model.safetensors", lambda s: s.pop(WEIGHT)),
        f"lacks 1 weights of its model (first: {WEIGHT})",
    ),
    "weight of another shape": (
        edit("model.safetensors", lambda s: s.update({WEIGHT: torch.zeros(3, 4)})),
        "cannot be read as a causal language model",
    ),
    "weights of another model": (
        edit("config.json", lambda c: c.update(intermediate_size=96, num_hidden_layers=3)),
        "cannot be read as a causal language model",
    ),
    "weights cut": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "cannot be read as a causal"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read as a causal"),
    "heads as text": (edit("config.json", lambda c: c.update(num_attention_heads="x")), "cannot be read as a causal"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be read as a causal"),
    "tokenizer a list": (lambda folder: (folder / "tokenizer.json").write_text("[]"), "cannot be read as a causal"),
    "tokenizer panics": (
        edit("tokenizer.json", lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AA"})),
        "cannot be read as a causal",
    ),
    "code of its own": (
        edit("config.json", lambda c: c.update(model_type="mine", auto_map={"AutoConfig": "evil.C"})),
        "unknown model_type 'mine'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_causal_model(place, llama, run_refused, name):
    import shutil

    shutil.rmtree(place / "model")
    shutil.copytree(llama, place / "model")
    change, said = BROKEN[name]
    change(place / "model")
    (place / "model" / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    more = ["--text", "TEXT", "--windows", "2", "--length", "32", "--kappa", "1"]
    assert said in run_refused("sinks", "MODEL", "--out", "OUT", *more)
