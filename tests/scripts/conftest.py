"""Modules of scripts/, the quick checkpoint and data of the masking benchmark, and tiny causal checkpoints."""

import importlib
from pathlib import Path

import pytest
import torch

from structprune.assets import model_directory
from structprune.models.quiet import quiet_transformers
from structprune.models.tokenizer import load_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load_script(name: str):
    """The module of that name in one of the rooms of scripts/."""
    (path,) = SCRIPTS.glob(f"*/{name}.py")
    return importlib.import_module(f"scripts.{path.parent.name}.{name}")


@pytest.fixture(scope="session")
def scripts():
    """`scripts(name)` -> a module of scripts/."""
    return load_script


@pytest.fixture
def mask_dir(scripts, tmp_path) -> Path:
    """A folder with the checkpoint and the data of `bench_masking.py --quick`."""
    bench = scripts("bench_masking")
    options = bench.parse_arguments(["--quick", "--threads", "1"])
    bench.write_checkpoint(tmp_path / "checkpoint", options)
    bench.write_data(tmp_path / "data.safetensors", options)
    return tmp_path


@pytest.fixture
def masking_request(scripts, mask_dir):
    """`masking_request(**changes)` -> what a worker is to do with them: sink-wanda at 0.25 unless told otherwise."""
    base = {
        "checkpoint": str(mask_dir / "checkpoint"), "data": str(mask_dir / "data.safetensors"),
        "method": "sink-wanda", "ratio": 0.25, "steps": 10, "interval": 5, "threads": 1,
    }  # fmt: skip
    return lambda **changes: scripts("published_worker").Request(**base | changes)


@pytest.fixture
def causal_source(tmp_path):
    """`causal_source(kind, name=None, **config changes)` -> a tiny random "llama" or "qwen2" with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 500.0}

    def make(kind: str, name: str | None = None, **changes) -> Path:
        config, model = (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (Qwen2Config, Qwen2ForCausalLM)
        torch.manual_seed(0)
        source = model(config(**sizes | changes))
        for key, parameter in source.named_parameters():  # attention is uneven, and biases are not zero
            parameter.data.normal_(std=0.3 if key.endswith("bias") or parameter.dim() == 2 else 0.1, mean=0.0)
            parameter.data.add_(float("norm" in key))
        with quiet_transformers():
            source.save_pretrained(tmp_path / (name or kind))
        load_tokenizer(model_directory()).save_pretrained(tmp_path / (name or kind))
        return tmp_path / (name or kind)

    return make
