"""A pruned model as a directory that loads anywhere: it appears complete or not at all."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Callable

import torch
from safetensors import SafetensorError

from structprune.checkpoint.atomic import whole_directory
from structprune.checkpoint.export import CODE_FILES, check_export, config_values
from structprune.errors import UserError
from structprune.models import modeling_structprune
from structprune.models.checkpoint_files import TOKENIZER_FILES, is_byte_pair, read_json
from structprune.models.loading import as_dtype
from structprune.models.modeling_structprune import DiffusionLM

CARRIED = (*TOKENIZER_FILES, "generation_config.json")
NARROW_TOKENIZERS = ("DreamTokenizer", "TokenizersBackend")  # of remote code, and of transformers 5 only
OURS = (CODE_FILES[1], "demo.json")  # an output of ours has one of them
Content = dict | str | Callable[[Path], None]


def check_output(
    directory: str | Path,
    source: str | Path | None,
    overwrite: bool = False,
    needed_bytes: int = 0,
    marks: tuple[str, ...] = OURS,
) -> Path:
    """An output directory that may be written; call it before long work.

    Args:
        source: the input checkpoint, which the output must not lie in.
        needed_bytes: what will be written.
        marks: a directory without any of these files is no earlier output, and never replaced.
    Raises:
        UserError: it exists (and is not to be overwritten), lies inside the input, its parent cannot be made or
            written, or the disk is too full.
    """
    directory = Path(directory).absolute()
    if source is not None:
        inside = Path(source).resolve()
        if directory.resolve() == inside or inside in directory.resolve().parents:
            raise UserError(f"output '{directory}' lies inside the input checkpoint '{source}': choose another place")
        if directory.resolve() in inside.parents and overwrite:
            raise UserError(f"output '{directory}' holds the input checkpoint '{source}': --overwrite would erase it")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise UserError(f"output '{directory}' exists: choose another, or add --overwrite")
    if directory.is_dir() and any(directory.iterdir()) and not any((directory / name).exists() for name in marks):
        raise UserError(f"output '{directory}' holds something else than an earlier output: choose another")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output '{directory}' is a file: choose another")
    anchor = directory.parent
    while not anchor.exists():
        anchor = anchor.parent
    if not anchor.is_dir() or not os.access(anchor, os.W_OK):
        raise UserError(f"output '{directory}' cannot be written: '{anchor}' is no directory that may be written to")
    free = shutil.disk_usage(anchor).free
    if needed_bytes > free:
        sizes = f"needs {needed_bytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there"
        raise UserError(f"output '{directory}' {sizes}")
    return directory


def save_pruned(
    model: DiffusionLM,
    directory: str | Path,
    *,
    tokenizer_source: str | Path | None = None,
    compat: str = "free",
    dtype: str | torch.dtype | None = None,
    max_shard_size: str = "5GB",
    files: dict[str, Content] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write weights, config, tokenizer, generation settings and the modeling files.

    Args:
        tokenizer_source: directory whose tokenizer and generation settings are carried; default the dense checkpoint.
        compat: export class (`structprune.checkpoint.export`).
        dtype: of the written weights; default the dense checkpoint's own.
        max_shard_size: such as "5GB".
        files: further files: a dict is written as JSON, text as it is, a callable gets the path.
        overwrite: replace an existing directory, once the new one is complete.
    Returns:
        The directory.
    Raises:
        UserError: see `check_output`; a class the model does not allow; a disk that fills up.
    """
    source = getattr(model, "source", None)
    values = source.values if source else None
    check_export(model.config, values, compat)
    dtype = as_dtype(dtype) or (source.dtype if source else model.dtype)
    carried = Path(tokenizer_source) if tokenizer_source else (source.directory if source else None)
    needed = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    directory = check_output(directory, carried, overwrite, needed)
    try:
        with whole_directory(directory) as draft:
            _write_weights(model, draft, dtype, max_shard_size)
            _write_json(draft / "config.json", config_values(model.config, values, compat, str(dtype).split(".")[1]))
            for name in CODE_FILES:
                shutil.copyfile(Path(modeling_structprune.__file__).with_name(name), draft / name)
            if carried is not None:
                _carry(carried, draft)
            for name, content in (files or {}).items():
                _write_content(draft / name, content)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or f"os error {errno.ENOSPC}" in str(error):  # safetensors tells it in words only
            raise UserError(f"no space left while writing '{directory}' ({needed / 1e9:.2f} GB of weights)") from error
        raise
    return directory


def _write_weights(model: DiffusionLM, draft: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Safetensors shards and their index; tensors are cast one shard at a time."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    state = model.state_dict()
    shapes = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in state.items()}
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=pattern, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        shard = {key: state[key].detach().to("cpu", dtype).contiguous() for key in keys}
        save_file(shard, draft / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(draft / "model.safetensors.index.json", index)


def _carry(source: Path, draft: Path) -> None:
    """Copy tokenizer and generation files; a tokenizer class that not every transformers has is replaced."""
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, draft / name)
    settings = draft / "tokenizer_config.json"
    if not settings.exists():
        return
    values = read_json(settings)
    if "auto_map" in values or values.get("tokenizer_class") in NARROW_TOKENIZERS:
        values.pop("auto_map", None)
        kind = "Qwen2Tokenizer" if is_byte_pair(draft) else "PreTrainedTokenizerFast"  # as `load_tokenizer` reads it
        _write_json(settings, values | {"tokenizer_class": kind})


def _write_content(path: Path, content: Content) -> None:
    if isinstance(content, dict):
        _write_json(path, content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        content(path)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
