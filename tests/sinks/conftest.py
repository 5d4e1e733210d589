"""Tiny causal language models of transformers, and the embedded tokenizer."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from structprune.assets import model_directory
from structprune.models.tokenizer import load_tokenizer

SIZES = {
    "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def causal_model(kind: str, **changes):
    """A random Llama, Qwen2 or Qwen3 whose attention is far from even."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(SIZES | {"head_dim": 8} | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5 if "embed" not in name else 1.0)
    return model.eval()


@pytest.fixture
def causal_checkpoint(tmp_path):
    """`causal_checkpoint(kind, **config changes)` -> a directory with model and tokenizer."""

    def make(kind: str = "Llama", **changes):
        folder = tmp_path / kind.lower()
        causal_model(kind, **changes).save_pretrained(folder)
        load_tokenizer(model_directory()).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(model_directory())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return made


@pytest.fixture
def largest():
    return Largest
