"""Output directories: checks before long work, and writing files into them."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from structprune.checkpoint.atomic import whole_directory
from structprune.checkpoint.export import CODE_FILES
from structprune.errors import UserError

OURS = (CODE_FILES[-1], "demo.json", "masks.safetensors")  # every output of ours has one of them
Content = dict | str | Callable[[Path], None]


def check_output(
    directory: str | Path,
    source: str | Path | None,
    overwrite: bool = False,
    needed_bytes: int = 0,
    marks: tuple[str, ...] = OURS,
) -> Path:
    """Check that an output directory can be written, before long work; returns its absolute path.

    Args:
        source: the input checkpoint, which must not contain the output.
        needed_bytes: size of what will be written.
        marks: a directory with none of these files is not an earlier output and is never replaced.
    Raises:
        UserError: it exists (without `overwrite`), lies inside the input or holds it, cannot be created or written, or
            the disk is too full.
    """
    directory = Path(directory).absolute()
    if source is not None:
        inside = Path(source).resolve()
        if directory.resolve() == inside or inside in directory.resolve().parents:
            raise UserError(f"output '{directory}' lies inside the input checkpoint '{source}': choose another place")
        if directory.resolve() in inside.parents and overwrite:
            raise UserError(f"output '{directory}' holds the input checkpoint '{source}': --overwrite would erase it")
    check_place(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output '{directory}' is a file: choose another")
    if directory.exists() and any(directory.iterdir()):
        if not overwrite:
            raise UserError(f"output '{directory}' exists: choose another, or add --overwrite")
        if not any((directory / name).exists() for name in marks):
            raise UserError(f"output '{directory}' holds something other than an earlier output: choose another")
    check_space(directory, needed_bytes)
    return directory


def check_space(path: str | Path, needed_bytes: int) -> None:
    """Check that the disk of an output has room for so many bytes.

    Raises:
        UserError: it has less.
    """
    path = Path(path).absolute()
    needed, free = needed_bytes / 1e9, shutil.disk_usage(_anchor(path)).free / 1e9
    if needed > free:
        remedy = "free some space, or choose another place"
        raise UserError(f"output '{path}' needs {needed:.2f} GB, but {free:.2f} GB are free there: {remedy}")


def _anchor(path: Path) -> Path:
    """The nearest parent that exists."""
    return next((folder for folder in path.parents if folder.exists()), path)


def check_place(path: str | Path) -> None:
    """Check that something can be written at `path`: make and remove a directory in its nearest existing parent.

    Permissions alone are not enough: the superuser has all of them, and some file systems are read-only.

    Raises:
        UserError: nothing can be written there, or the name is not allowed.
    """
    path = Path(path).absolute()
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", dir=_anchor(path)))
    except OSError as error:
        raise UserError(f"output '{path}' cannot be written ({error.strerror}): choose another place") from error


@contextmanager
def output_draft(
    directory: Path, source: Path | None, overwrite: bool, needed_bytes: int, files: dict[str, Content] | None
) -> Iterator[Path]:
    """`whole_directory` for a checkpoint, after `check_output`; `files` are written last.

    Raises:
        UserError: see `check_output`; a full disk.
    """
    directory = check_output(directory, source, overwrite, needed_bytes)
    try:
        with whole_directory(directory) as draft:
            yield draft
            for name, content in (files or {}).items():
                write_content(draft / name, content)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or f"os error {errno.ENOSPC}" in str(error):  # safetensors gives it only as text
            reason = f"no space left while writing '{directory}' ({needed_bytes / 1e9:.2f} GB of weights)"
            raise UserError(f"{reason}: free some space, or choose another place") from error
        raise


def write_shards(
    draft: Path, headers: dict[str, torch.Tensor], read: Callable[[str], torch.Tensor], max_shard_size: str = "5GB"
) -> None:
    """Write safetensors shards and their index with transformers' file names; one shard is in memory at a time.

    Args:
        headers: name -> tensor on the meta device, with the shape and dtype to write.
        read: name -> tensor to write, contiguous and on the CPU.
    """
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(headers, filename_pattern=pattern, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: read(key) for key in keys}, draft / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(draft / "model.safetensors.index.json", index)


def write_content(path: Path, content: Content) -> None:
    """Write a dict as JSON, text as it is; a callable gets the path."""
    if callable(content):
        content(path)
    elif isinstance(content, dict):
        write_json(path, content)
    else:
        path.write_text(content, encoding="utf-8")


def write_json(path: Path, values: dict) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
