"""Checkpoints of a published shape with random weights: speed and memory depend only on the shape."""

from dataclasses import dataclass
from pathlib import Path

import torch

from structprune.checkpoint.atomic import whole_directory
from structprune.checkpoint.output import write_json, write_shards
from structprune.models.families import FAMILIES
from structprune.models.joined import join_state

LLADA = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "activation_type": "silu", "block_type": "llama",
    "layer_norm_type": "rms", "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "include_bias": False, "include_qkv_bias": False, "weight_tying": False, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
SHARP = 2.0  # gain of query and key weights, which makes attention about as uneven as in a trained model


@dataclass(frozen=True)
class LLaDAShape:
    """Sizes of a LLaDA."""

    width: int
    heads: int
    blocks: int
    channels: int
    vocabulary: int
    positions: int


def llada_values(shape: LLaDAShape, dtype: str) -> dict:
    """config.json of a LLaDA of that shape; the last token is the mask."""
    sizes = {"d_model": shape.width, "n_heads": shape.heads, "n_kv_heads": shape.heads, "n_layers": shape.blocks}
    sizes |= {"mlp_hidden_size": shape.channels, "max_sequence_length": shape.positions}
    sizes |= dict.fromkeys(("vocab_size", "embedding_size"), shape.vocabulary)
    return LLADA | sizes | {"mask_token_id": shape.vocabulary - 1, "torch_dtype": dtype}


def write_random(directory: Path, values: dict, seed: int = 0, device: str = "cpu") -> Path:
    """Write a checkpoint in the official layout, without a tokenizer, one tensor at a time, whole or not at all.

    An earlier checkpoint there is replaced.

    Args:
        values: its config.json, with `torch_dtype`.
        device: where the random numbers are drawn.
    """
    family = next(each for each in FAMILIES if values["model_type"] in each.model_types)
    skipped = ("model_type", "architectures", "torch_dtype")
    dtype = getattr(torch, values["torch_dtype"])
    with torch.device("meta"):
        model = family.model_class(family.config_class(**{k: v for k, v in values.items() if k not in skipped}))
    headers = {name: torch.cat(parts).to(dtype) for name, parts in join_state(model, model.stored_state()).items()}
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str) -> torch.Tensor:
        shape = headers[name].shape
        if len(shape) == 1:  # norms are 1, biases 0
            return torch.full(shape, float(name.endswith("weight")), dtype=dtype)
        gain = 0.06 * shape[1] ** 0.5 if name == family.embedding else SHARP if _attends(name) else 1.0
        weight = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return weight.mul_(gain * shape[1] ** -0.5).cpu()

    with whole_directory(directory, replaces=("config.json",)) as draft:
        write_shards(draft, headers, draw)
        write_json(draft / "config.json", values)
    return directory


def _attends(name: str) -> bool:
    return "q_proj" in name or "k_proj" in name
