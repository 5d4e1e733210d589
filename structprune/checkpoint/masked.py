"""A model with zeros in place, in its source's own layout: what is not changed is copied byte by byte, and never run.

Every tool that reads the source checkpoint reads the output as well; the file is no smaller.
"""

import os
import shutil
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator, NamedTuple

import torch

from structprune.checkpoint.atomic import whole_directory
from structprune.checkpoint.output import Content, check_output, full_disk_refused, write_content, write_shards
from structprune.errors import UserError
from structprune.models.checkpoint_files import is_weights, read_header, read_json, shard_names
from structprune.models.loading import DTYPES, Source, read_pickle
from structprune.models.modeling_structprune import DiffusionLM

INDEX = "model.safetensors.index.json"
BY_PRODUCTS = ("calibration.safetensors", "masks.safetensors", "report.json", "plan.json", "demo.json")
CHUNK = 1 << 24  # bytes copied at once
Value = Callable[[str, torch.dtype], torch.Tensor]  # name, stored dtype -> what to write, on the CPU


class Stored(NamedTuple):
    """A tensor of the source; `dtype` is None where safetensors has one that models are not stored in."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    shard: str


def save_masked(
    model: DiffusionLM,
    directory: str | Path,
    *,
    changed: Iterable[str],
    files: dict[str, Content] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the source checkpoint again, with the values of some of its weights taken from the model.

    Shards, their index, shapes and stored dtypes stay as they are (pickled shards become safetensors). Config,
    tokenizer, Python files and all else are carried over untouched, but for hidden files, `__pycache__`, weights that
    the index does not name and by-products of an earlier run.

    Args:
        model: from `structprune.load_model`, in the shapes it was loaded in.
        changed: state-dict names whose values are the model's; all others are the source's.
        files: further files, in place of the source's of that name: a dict is written as JSON, text as it is, a
            callable gets the path. Only an output with `masks.safetensors` can be overwritten later.
        overwrite: replace an existing directory, once the new one is complete.
    Returns:
        The directory.
    Raises:
        UserError: see `check_output`; a model without source; a source that is gone, incomplete or not what was
            loaded; a name that is not stored; values that the stored dtype cannot hold; a disk that fills up.
    """
    source, changed = _source(model), frozenset(changed)
    names = shard_names(source.directory, allow_pickle=True)
    stored, state = _read_stored(source.directory, names), model.state_dict()
    _check(stored, state, changed, source.directory)
    carried = list(_carried(source.directory))
    needed = sum((source.directory / path).stat().st_size for path in (*names, *carried))
    directory = check_output(directory, source.directory, overwrite, needed)
    value = partial(_value, state)
    with full_disk_refused(directory, needed), whole_directory(directory) as draft:
        if names[0].endswith(".bin"):
            _convert(source.directory, draft, stored, changed, value)
        else:
            for name in names:
                _rewrite(source.directory / name, draft / name, changed, value)
        for path in carried:
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.directory / path, draft / path)
        for name, content in (files or {}).items():
            write_content(draft / name, content)
    return directory


def _source(model: DiffusionLM) -> Source:
    """Where the model came from, which must still be there, with the config it had."""
    source = getattr(model, "source", None)
    if source is None:
        raise UserError("the model has no source checkpoint to write again: load it with structprune.load_model")
    if not source.directory.is_dir():
        raise UserError(f"the source checkpoint '{source.directory}' is gone: put it back, or load the model again")
    if read_json(source.directory / "config.json") != source.values:
        raise UserError(f"{source.directory / 'config.json'} changed since the model was loaded: load it again")
    return source


def _read_stored(directory: Path, names: list[str]) -> dict[str, Stored]:
    """Every tensor of the shards `names`, without reading values."""
    found = {}
    for name in names:
        if name.endswith(".bin"):
            tensors = read_pickle(directory / name, mapped=True)
            found |= {key: Stored(tuple(tensor.shape), tensor.dtype, name) for key, tensor in tensors.items()}
        else:
            headers = read_header(directory / name)
            found |= {key: Stored(header.shape, DTYPES.get(header.dtype), name) for key, header in headers.items()}
    return found


def _check(stored: dict[str, Stored], state: dict[str, torch.Tensor], changed: frozenset[str], directory: Path) -> None:
    """Raises UserError where the source does not hold what the model was loaded from, or a changed weight."""
    for name in sorted(changed):
        if name not in stored or name not in state:
            lacking = directory if name not in stored else "the model"
            raise UserError(f"{lacking} has no weight '{name}': only stored weights can be changed")
        if stored[name].dtype not in DTYPES.values():
            raise UserError(f"{directory}: {name} is stored in a dtype that masks are not written in ({[*DTYPES]} are)")
    for name, tensor in state.items():
        shape = stored[name].shape if name in stored else "not there"
        if shape != tuple(tensor.shape):
            differs = f"{name} is {shape}, but {tuple(tensor.shape)} in the model"
            raise UserError(f"{directory} is not what the model was loaded from ({differs}): load it again")


def _value(state: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    tensor = state[name].detach().to("cpu", dtype).contiguous()
    if not tensor.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} has values that {kind}, its stored dtype, cannot hold (NaN, Inf or too large)")
    return tensor


def _rewrite(source: Path, target: Path, changed: frozenset[str], value: Value) -> None:
    """Copy a safetensors shard, its header too, with the bytes of the changed tensors replaced."""
    headers = {name: header for name, header in read_header(source).items() if name in changed}
    with source.open("rb") as old, target.open("wb") as new:
        for name, header in sorted(headers.items(), key=lambda item: item[1].span):
            begin, end = header.span
            _copy_bytes(old, new, begin - old.tell())
            tensor = value(name, DTYPES[header.dtype])
            if tensor.nbytes != end - begin:
                raise UserError(f"{source} is damaged: {name} has {end - begin} bytes, not {tensor.nbytes}")
            new.write(tensor.reshape(-1).view(torch.uint8).numpy())
            old.seek(end)
        shutil.copyfileobj(old, new, CHUNK)


def _copy_bytes(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count > 0:
        chunk = old.read(min(CHUNK, count))
        if not chunk:
            raise UserError(f"{old.name} was cut short while it was read: load the model again")
        new.write(chunk)
        count -= len(chunk)


def _convert(source: Path, draft: Path, stored: dict[str, Stored], changed: frozenset[str], value: Value) -> None:
    """Pickled shards as safetensors; tensors that are not changed keep their values and dtypes."""

    @lru_cache(maxsize=1)
    def shard(name: str) -> dict[str, torch.Tensor]:
        return read_pickle(source / name, mapped=True)

    def read(name: str) -> torch.Tensor:
        if name in changed:
            return value(name, stored[name].dtype)
        return shard(stored[name].shard)[name].contiguous().clone()  # tied ones may share memory, in files they cannot

    write_shards(draft, {n: torch.empty(s.shape, dtype=s.dtype, device="meta") for n, s in stored.items()}, read)


def _carried(source: Path) -> Iterator[Path]:
    """What is copied as it is, relative to `source`, links followed: all but weights and what came of earlier runs.

    Raises:
        UserError: a file that cannot be read, as a link to nowhere.
    """
    for path in _files_below(source, tuple(source.resolve().parents)):
        place = path.relative_to(source)
        if str(place) in BY_PRODUCTS or (is_weights(path.name) and str(place) != INDEX):
            continue
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} cannot be read: finish the download, or mend its permissions")
        if path.is_file():  # else a pipe or the like
            yield place


def _files_below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """All but hidden files and folders; a link to a folder that holds it is not followed."""
    here = folder.resolve()
    if here in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _files_below(path, (*above, here))
        else:
            yield path
