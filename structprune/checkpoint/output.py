"""Output directories: checks before long work, and writing files into them."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from structprune.checkpoint.atomic import free_place, is_fixed, may_replace, output_place, whole_directory
from structprune.checkpoint.drafts import clean_up, new_draft
from structprune.checkpoint.export import CODE_FILES
from structprune.errors import UserError
from structprune.files import full_disk_errors
from structprune.models.finite import all_finite
from structprune.models.tensor_files import write_streamed

OURS = (CODE_FILES[-1], "demo.json", "masks.safetensors")  # every output of ours has one of them
Content = dict | str | Callable[[Path], None]


class OutputTaken(UserError):
    """There is something at the place of an output that must not be replaced."""


def check_output(
    directory: str | Path,
    source: str | Path | None,
    overwrite: bool = False,
    needed_bytes: int = 0,
    marks: tuple[str, ...] = OURS,
) -> Path:
    """Check that an output directory can be written, before long work; returns its absolute path.

    What killed runs left there is cleaned up first (`structprune.checkpoint.drafts`).

    Args:
        source: the input checkpoint, which must not contain the output.
        needed_bytes: size of what will be written.
        marks: a directory with none of these files is not an earlier output and is never replaced.
    Raises:
        UserError: it lies inside the input or holds it, cannot be created or written, or the disk is too full.
        OutputTaken: it exists (without `overwrite`), is something else than an earlier output, or cannot be replaced.
    """
    directory = output_place(directory)
    if source is not None:
        check_apart(directory, source, overwrite)
    check_place(directory)
    if os.path.lexists(directory) and not directory.is_dir():
        kind = "a file" if directory.exists() else "a broken link"
        raise OutputTaken(f"output '{directory}' is {kind}: choose another")
    if directory.exists() and any(directory.iterdir()):
        if not overwrite:
            raise OutputTaken(f"output '{directory}' exists: choose another, or add --overwrite")
        if not may_replace(directory, marks):
            raise OutputTaken(f"output '{directory}' holds something other than an earlier output: choose another")
        if is_fixed(directory):
            place = "is a mount point or holds the current directory, so that it cannot be replaced"
            raise OutputTaken(f"output '{directory}' {place}: empty it, or choose another")
    check_space(directory, needed_bytes)
    return directory


def check_apart(directory: str | Path, source: str | Path, overwrite: bool = False) -> None:
    """Check that an output and a checkpoint that is read do not contain each other.

    Raises:
        UserError: they do (the output may hold the checkpoint without `overwrite`).
    """
    place, inside = output_place(directory).resolve(), Path(source).resolve()
    if place == inside or inside in place.parents:
        raise UserError(f"output '{directory}' lies inside the input checkpoint '{source}': choose another place")
    if place in inside.parents and overwrite:
        raise UserError(f"output '{directory}' holds the input checkpoint '{source}': --overwrite would erase it")


@dataclass(frozen=True)
class Room:
    """Bytes that something takes on a disk.

    Attributes:
        what: lies at `path`, for messages. remedy: what the user can do beside freeing space.
    """

    path: Path
    needed: int
    what: str = "output"
    remedy: str = ""


def check_space(path: str | Path, needed_bytes: int) -> None:
    """`check_rooms` for an output."""
    check_rooms([Room(Path(path), needed_bytes)])


def check_rooms(rooms: Iterable[Room]) -> None:
    """Check that every disk has room for all that goes to it together.

    Raises:
        UserError: one has less.
    """
    disks: dict[int, list[Room]] = {}
    for room in rooms:
        if room.needed > 0:
            disks.setdefault(_disk(room.path), []).append(room)
    for group in disks.values():
        needed = sum(room.needed for room in group) / 1e9
        free = shutil.disk_usage(_home(group[0].path)).free / 1e9
        if needed > free:
            remedies = ["free some space", *(room.remedy for room in group if room.remedy)]
            raise UserError(
                f"{_sizes(group, needed)}, but {free:.2f} GB are free there: {', '.join(remedies)}, or choose another"
                " place"
            )


def _disk(path: Path) -> int:
    """The number of the disk that something would lie on."""
    return _home(path).stat().st_dev


def _home(path: Path) -> Path:
    """What exists of a path: itself, which may be a mount point, or its nearest parent."""
    path = path.absolute()
    return path if path.exists() else _anchor(path)


def _sizes(rooms: list[Room], needed: float) -> str:
    """What takes the room of a disk; `needed` in GB."""
    if len(rooms) == 1:
        return f"{rooms[0].what} '{rooms[0].path}' needs {needed:.2f} GB"
    *first, last = [f"{room.what} '{room.path}' ({room.needed / 1e9:.2f} GB)" for room in rooms]
    return f"{', '.join(first)} and {last} need {needed:.2f} GB of one disk together"


def _anchor(path: Path) -> Path:
    """The nearest parent that exists."""
    return next((folder for folder in path.parents if folder.exists()), path)


def check_place(path: str | Path) -> None:
    """Check that something can be written at `path`: make and remove a draft in its nearest existing parent.

    Permissions alone are not enough: the superuser has all of them, and some file systems are read-only.

    Raises:
        UserError: nothing can be written there, or the name is not allowed.
    """
    path = output_place(path)
    try:
        home = path if is_fixed(path) else _anchor(path)
        place = path if home == path else home / path.name
        clean_up(place)
        with new_draft(place, home):
            pass
    except OSError as error:
        raise UserError(f"output '{path}' cannot be written ({error.strerror}): choose another place") from error


@contextmanager
def output_draft(
    directory: Path,
    overwrite: bool,
    files: dict[str, Content] | None = None,
    needed_bytes: int = 0,
    marks: tuple[str, ...] = OURS,
) -> Iterator[Path]:
    """`whole_directory` for an output that `check_output` has allowed; `files` are written last.

    Args:
        overwrite, needed_bytes, marks: as in `check_output`.
    Raises:
        UserError: see `whole_directory`; a full disk.
    """
    size = f" ({needed_bytes / 1e9:.2f} GB of weights)" if needed_bytes else ""
    with full_disk_errors(directory, size=size), whole_directory(directory, marks if overwrite else ()) as draft:
        yield draft
        for name, content in (files or {}).items():
            write_content(draft / name, content)


def save_finished(save: Callable[[Path, bool], Path], directory: Path, overwrite: bool) -> Path:
    """Save what a long run has made; where its place was taken meanwhile, beside it.

    Args:
        save: writes to a directory, with or without overwriting.
    Raises:
        UserError: see `check_output`; the place was taken: the message names the other one.
    """
    try:
        return save(directory, overwrite)
    except OutputTaken as error:
        place = save(free_place(output_place(directory)), False)
        reason = f"output '{directory}' came to hold something else meanwhile"
        raise UserError(f"{reason}: the finished run is kept in '{place}', move it") from error


def write_shards(
    draft: Path, headers: dict[str, torch.Tensor], read: Callable[[str], torch.Tensor], max_shard_size: str = "5GB"
) -> None:
    """Write safetensors shards and their index with transformers' file names; one tensor is in memory at a time.

    Args:
        headers: name -> tensor on the meta device, with the shape and dtype to write.
        read: name -> tensor to write, contiguous and on the CPU.
    """
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(headers, filename_pattern=pattern, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        write_streamed(draft / name, {key: headers[key] for key in keys}, read, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(draft / "model.safetensors.index.json", index)


def as_stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight as it is written, contiguous and on the CPU.

    Raises:
        UserError: float16 cannot hold it.
    """
    stored = tensor.detach().to("cpu", dtype).contiguous()
    if dtype == torch.float16 and not all_finite(stored):
        largest = f"{tensor.abs().max().item():.3g}"
        raise UserError(f"float16 cannot hold {name} (largest {largest}): write bfloat16 or float32")
    return stored


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
