"""A model as one GGUF file, for llama.cpp's loaders of LLaDA and Dream.

They read one width for all blocks; LLaDA's takes a head size of its own, Dream's shares the hidden size among heads.
Weights are written one by one, so that memory holds the model and one tensor more.

Shapes: O outputs, C features, D head size.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from structprune.checkpoint.export import CLASSES, obstacles
from structprune.checkpoint.gguf_tokens import Vocabulary
from structprune.checkpoint.output import as_stored, check_apart, check_place, check_space
from structprune.errors import UserError
from structprune.files import full_disk_errors, make_folders, remove_folders, whole_file
from structprune.models.adapter import Adapter
from structprune.models.families import FAMILIES, family_of
from structprune.models.family import GgufLoader
from structprune.models.loading import source_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track, untracked

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # of a weight
MAGIC = b"GGUF"  # how such a file begins
GROUP = 32  # weights that share a scale in q8_0
NAMES = {  # role of a block's part -> its name in the file
    "attention_norm": "attn_norm", "query": "attn_q", "key": "attn_k", "value": "attn_v",
    "attention_output": "attn_output", "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def check_gguf(config: Any, source_values: dict | None) -> GgufLoader:
    """The loader that reads a model.

    Raises:
        UserError: there is none, with the reason.
    """
    family = family_of(config)
    loader = family.gguf
    if loader is None:
        known = " and ".join(each.name for each in FAMILIES if each.gguf is not None)
        raise UserError(f"--gguf is for {known}, whose loaders llama.cpp has: this is {family.name}")
    reason = obstacles(config, source_values).get(loader.compat)
    if reason is None and any(getattr(config, key, False) for key in ("include_bias", "include_qkv_bias")):
        reason = "its linears have biases"
    if reason:
        allowed = " or ".join(CLASSES[: CLASSES.index(loader.compat) + 1])
        raise UserError(f"llama.cpp reads a {family.name} of class {allowed}, and this is none: {reason}")
    return loader


def check_gguf_place(path: Path, source: Path, needed_bytes: int, overwrite: bool) -> None:
    """Check the place of a file before long work.

    Raises:
        UserError: something is there (with `overwrite`: other than a GGUF file), it lies in the `source` checkpoint, it
            cannot be written, or the disk is too full.
    """
    if path.is_dir():
        raise UserError(f"--gguf {path} is a directory: give a file, such as {path / 'model.gguf'}")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"--gguf {path} exists: choose another, or add --overwrite")
    if os.path.lexists(path) and not _is_gguf(path):
        raise UserError(f"--gguf {path} is no GGUF file, and is not replaced: choose another")
    check_apart(path, source)
    check_place(path)
    check_space(path, needed_bytes)


def _is_gguf(path: Path) -> bool:
    """Whether a regular file begins as such files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def needed_bytes(parameters: int, kind: str | None, stored: torch.dtype) -> int:
    """About what a file takes, of weights that are stored in `stored`."""
    return int(parameters * BYTES[kind or STORED.get(stored, "f32")])


def require_gguf() -> None:
    """Raise UserError where the package gguf is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("--gguf needs the package gguf: pip install 'structprune[gguf]'") from error


def write_gguf(
    model: DiffusionLM, path: Path, kind: str | None = None, split: str | None = None, track: Track = untracked
) -> Path:
    """Write weights, sizes and tokenizer as one file; it appears complete or not at all.

    Args:
        model: from `structprune.load_model`, whose directory has the tokenizer.
        kind: of the weights, one of `GGUF_TYPES`; default the source's dtype. Norms and biases are f32, and of q8_0
            matrices whose rows are no multiple of 32 are f16.
        split: as for `Vocabulary`.
        track: wraps the tensors that are written.
    Raises:
        UserError: a model that llama.cpp does not read, a tokenizer that GGUF has no terms for, a full disk, or the
            package gguf is missing.
    """
    require_gguf()
    source, adapter = source_of(model), Adapter(model)
    loader = check_gguf(model.config, source.values)
    kind = kind or STORED.get(source.dtype, "f32")
    vocabulary = Vocabulary(source.directory, adapter.vocabulary, split)
    made = make_folders(path.parent)
    try:
        with full_disk_errors(path), whole_file(path) as draft:
            _write(draft, adapter, loader, vocabulary, kind, track)
    except BaseException:
        remove_folders(made)
        raise
    return path


def _write(draft: Path, adapter: Adapter, loader: GgufLoader, vocabulary: Vocabulary, kind: str, track: Track) -> None:
    """Header, values and tensors, of which one at a time is converted."""
    import gguf

    writer = gguf.GGUFWriter(draft, loader.name)
    _add_values(writer, adapter, kind)
    _add_tokens(writer, vocabulary, source_of(adapter.model).directory, adapter.mask_id)
    for name, tensor, _ in _tensors(adapter, loader):
        stored = _stored(tensor, kind)
        group, size = gguf.GGML_QUANT_SIZES[stored]  # weights, and the bytes that they take
        nbytes = tensor.numel() // group * size
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), nbytes, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor, heads in track(list(_tensors(adapter, loader)), "writing tensors"):
        stored, rows = _stored(tensor, kind), tensor if heads is None else interleaved(tensor, heads)
        half = stored == gguf.GGMLQuantizationType.F16
        array = as_stored(name, rows, torch.float16 if half else torch.float32).numpy()
        writer.write_tensor_data(array if half else gguf.quantize(array, stored))
    writer.close()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k, (heads D, C), with those that rotary positions turn together as neighbours.

    Our layers, as the published ones, turn row i of a head with row i + D / 2.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])  # (H, 2, D / 2, C)
    return halves.transpose(1, 2).reshape(weight.shape)


def _tensors(adapter: Adapter, loader: GgufLoader) -> Iterator[tuple[str, torch.Tensor, int | None]]:
    """Name in the file, tensor, and the heads of one whose rows are to be interleaved."""
    model = adapter.model
    yield "token_embd.weight", model.embedding.weight, None
    for block in adapter.blocks:
        widths = block.widths
        heads = {"query": widths.query_heads, "key": widths.kv_heads} if loader.interleaved else {}
        for role, name in NAMES.items():
            part: Any = block.module.part(role)
            yield f"blk.{block.index}.{name}.weight", part.weight, heads.get(role)
            if getattr(part, "bias", None) is not None:
                yield f"blk.{block.index}.{name}.bias", part.bias, heads.get(role)
    yield "output_norm.weight", model.final_norm.weight, None
    yield "output.weight", model.output_head.weight, None


def _stored(tensor: torch.Tensor, kind: str) -> Any:
    """How a tensor is stored: matrices as asked, all else in f32."""
    import gguf

    types = gguf.GGMLQuantizationType
    if tensor.dim() < 2:
        return types.F32
    return types.F16 if kind == "q8_0" and tensor.shape[-1] % GROUP else types[kind.upper()]


def _add_values(writer: Any, adapter: Adapter, kind: str) -> None:
    """Sizes, and what decides the computation."""
    import gguf

    config = adapter.model.config
    first = adapter.blocks[0].widths
    writer.add_name(source_of(adapter.model).name)
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_block_count(len(adapter.blocks))
    writer.add_context_length(adapter.positions)
    writer.add_embedding_length(adapter.hidden_size)
    writer.add_feed_forward_length(first.channels)
    writer.add_head_count(first.query_heads)
    writer.add_head_count_kv(first.kv_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(adapter.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(adapter.vocabulary)
    writer.add_causal_attention(False)
    writer.add_diffusion_shift_logits(adapter.model.shifted)


def _add_tokens(writer: Any, vocabulary: Vocabulary, directory: Path, mask_id: int) -> None:
    """The tokenizer: tokens, merges, special tokens and chat template."""
    import gguf

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    special = gguf.SpecialVocab(directory, load_merges=True, n_vocab=len(vocabulary.tokens))
    special.special_token_ids["mask"] = mask_id
    special.add_to_gguf(writer, quiet=True)
