"""A masked model in the layout of its source checkpoint: all that does not change is copied byte by byte.

Every tool that reads the source reads the output; the files are not smaller. No code of the source is run.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import torch

from structprune.checkpoint.learnt_text import LEARNT
from structprune.checkpoint.output import Content, check_output, output_draft, write_json, write_shards
from structprune.errors import UserError
from structprune.models.checkpoint_files import is_weights, read_json, shard_names
from structprune.models.config_values import quantisation
from structprune.models.finite import all_finite
from structprune.models.headers import TensorHeader, read_headers
from structprune.models.joined import joined_names, split_stored
from structprune.models.loading import DTYPES, read_pickle, source_of
from structprune.models.maps import give_back_pages, map_shard, place_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.tensor_files import raw_bytes

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BY_PRODUCTS = ("calibration.safetensors", "masks.safetensors", "report.json", "plan.json", "demo.json")
CHUNK = 1 << 24  # bytes copied at once
Value = Callable[[str, torch.dtype], torch.Tensor]  # name, stored dtype -> the tensor to write, on the CPU


def save_masked(
    model: DiffusionLM,
    directory: str | Path,
    *,
    changed: Iterable[str],
    files: dict[str, Content] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the source checkpoint again, with the values of some weights from the model.

    Shards, their index, shapes and stored dtypes stay the same (pickled shards become safetensors). Config, tokenizer,
    Python files and all other files are copied, except hidden files, `__pycache__`, weights that the index does not
    name, and by-products of an earlier run.

    Args:
        model: from `structprune.load_model`, in the shapes it was loaded in.
        changed: state-dict names whose values come from the model; all others come from the source.
        files, overwrite: as in `save_pruned`; files replace those of the source. Only an output with
            `masks.safetensors` can be overwritten later.
    Returns:
        The directory.
    Raises:
        UserError: see `check_output`; a model without source; a source that is missing, incomplete or not what was
            loaded; a name that is not stored; values that the stored dtype cannot hold; a full disk.
    """
    source, changed = _intact_source(model), frozenset(changed)
    names = shard_names(source, allow_pickle=True)
    raw, followers = _read_stored(source, names), model.followers
    stored = split_stored(model, raw, source)
    changed |= {name for name, leader in followers.items() if name in stored and leader in changed}
    state = {name: value for name, value in model.state_dict().items() if name in stored or name not in followers}
    _check(stored, state, changed, source)
    copied = list(_copied_files(source, source, tuple(source.resolve().parents)))
    if names == [WHOLE]:  # an index is left over from other shards
        copied = [path for path in copied if str(path) != INDEX]
    needed = sum((source / path).stat().st_size for path in (*map(Path, names), *copied))
    needed -= sum(state[name].nbytes for name in changed if _goes(state[name], stored[name]))
    value = partial(_value, state)
    directory = check_output(directory, source, overwrite, needed)
    with output_draft(directory, overwrite, files, needed) as draft:
        if names[0].endswith(".bin"):
            wholes = {name: tuple(parts) for name, parts in joined_names(model).items() if changed & parts.keys()}
            _convert(source, draft, raw, {name: (name,) for name in changed} | wholes, value)
        for name in names if names[0].endswith(".safetensors") else ():
            headers = {key: stored[key] for key in changed if stored[key].shard == name}
            _rewrite(source / name, draft / name, headers, value, partial(_move, model, state))
        _copy(copied, source, draft)
        _write_config(source_of(model).values, draft / "config.json")
    return directory


def _copy(paths: list[Path], source: Path, draft: Path) -> None:
    """Copy files, relative to `source`."""
    for path in paths:
        (draft / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, draft / path)


def _write_config(values: dict, path: Path) -> None:
    """Replace a copied config.json where the model is not as it says.

    Args:
        values: of the model, with a size of blocks that the user gave. What is written is not quantised.
    """
    values = {key: values[key] for key in values if key != "quantization_config" or not quantisation(values)}
    if values != read_json(path):
        write_json(path, values)


def _intact_source(model: DiffusionLM) -> Path:
    """The directory the model came from; it must still exist, with the same config."""
    source = source_of(model)
    if not source.directory.is_dir():
        raise UserError(f"the source checkpoint '{source.directory}' is gone: put it back, or load the model again")
    stored = read_json(source.directory / "config.json")
    given = {"block_size"} - set(stored)  # of the user, see `load_model`
    if stored != {key: value for key, value in source.values.items() if key not in given}:
        raise UserError(f"{source.directory / 'config.json'} changed since the model was loaded: load it again")
    return source.directory


def _read_stored(directory: Path, names: list[str]) -> dict[str, TensorHeader]:
    """All tensors of the shards `names`, without reading values; pickled ones of other dtypes have dtype ""."""
    if not names[0].endswith(".bin"):
        return read_headers(directory, names)
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    return {
        key: TensorHeader(tuple(tensor.shape), kinds.get(tensor.dtype, ""), name)
        for name in names
        for key, tensor in read_pickle(directory / name, mapped=True).items()
    }


def _check(
    stored: dict[str, TensorHeader], state: dict[str, torch.Tensor], changed: frozenset[str], directory: Path
) -> None:
    """Raise UserError if the source no longer matches the model, or a changed weight cannot be stored."""
    for name in sorted(changed):
        if name not in stored or name not in state:
            owner = directory if name not in stored else "the model"
            raise UserError(f"{owner} has no weight '{name}': only stored weights can be changed")
        if stored[name].dtype not in DTYPES:
            dtypes = f"a dtype that masks cannot be written in (only {[*DTYPES]})"
            raise UserError(f"{directory}: {name} is stored in {dtypes}")
    for name, tensor in state.items():
        shape = stored[name].shape if name in stored else "not there"
        if shape != tuple(tensor.shape):
            difference = f"{name} is {shape}, but {tuple(tensor.shape)} in the model"
            raise UserError(f"{directory} is not what the model was loaded from ({difference}): load it again")


def _value(state: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    tensor = state[name].detach().to("cpu", dtype).contiguous()
    if not all_finite(tensor):
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} has values that {kind}, its stored dtype, cannot hold (NaN, Inf or too large)")
    return tensor


def _goes(weight: torch.Tensor, header: TensorHeader) -> bool:
    """Whether a weight is in a temporary file as it will be in the output, which then takes its place."""
    place = place_of(weight)
    return place is not None and place.temporary and weight.dtype == DTYPES.get(header.dtype)


def _move(model: DiffusionLM, state: dict[str, torch.Tensor], name: str, header: TensorHeader, target: Path) -> None:
    """Let a weight in a temporary file be the one that was written: the disk need not hold both."""
    weight = model.get_parameter(name)
    if (place := place_of(weight)) and place.dtype and _goes(weight, header):
        state[name] = weight.data = map_shard(target, {name: header}, place.dtype)[name]


def _rewrite(
    source: Path,
    target: Path,
    headers: dict[str, TensorHeader],
    value: Value,
    written: Callable[[str, TensorHeader, Path], None],
) -> None:
    """Copy a safetensors shard with its header, replacing the bytes of the changed tensors.

    Args:
        headers: of these. written: called after each of them.
    """
    with source.open("rb") as old, target.open("wb") as new:
        for name, header in sorted(headers.items(), key=lambda item: item[1].span):
            begin, end = header.span
            _copy_bytes(old, new, begin - old.tell())
            tensor = value(name, DTYPES[header.dtype])
            if tensor.nbytes != end - begin:
                raise UserError(f"{source} is damaged: {name} has {end - begin} bytes, not {tensor.nbytes}")
            new.write(raw_bytes(tensor))
            new.flush()
            del tensor
            written(name, header, target)
            give_back_pages()
            old.seek(end)
        shutil.copyfileobj(old, new, CHUNK)


def _copy_bytes(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count > 0:
        chunk = old.read(min(CHUNK, count))
        if not chunk:
            raise UserError(f"{old.name} became shorter while it was read: load the model again")
        new.write(chunk)
        count -= len(chunk)


def _convert(
    source: Path, draft: Path, stored: dict[str, TensorHeader], changed: dict[str, tuple[str, ...]], value: Value
) -> None:
    """Write pickled shards as safetensors; unchanged tensors keep their values and dtypes.

    Args:
        changed: stored name -> the model's names of what it holds, row below row.
    """

    @lru_cache(maxsize=1)
    def shard(name: str) -> dict[str, torch.Tensor]:
        return read_pickle(source / name, mapped=True)

    def read(name: str) -> torch.Tensor:
        tensor = shard(stored[name].shard)[name]
        if name in changed:
            return torch.cat([value(part, tensor.dtype) for part in changed[name]])  # (O, C)
        return tensor.contiguous().clone()  # because safetensors refuses tensors that share memory

    headers = {key: torch.empty_like(shard(header.shard)[key], device="meta") for key, header in stored.items()}
    write_shards(draft, headers, read)


def _copied_files(source: Path, folder: Path, ancestors: tuple[Path, ...]) -> Iterator[Path]:
    """Files to copy, relative to `source`: all except hidden files, weights and by-products of earlier runs.

    Links are followed, except those to one of their own ancestors.

    Raises:
        UserError: a file that cannot be read, such as a broken link.
    """
    resolved = folder.resolve()
    if resolved in ancestors:
        return
    for path in sorted(folder.iterdir()):
        relative = path.relative_to(source)
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _copied_files(source, path, (*ancestors, resolved))
        elif str(relative) in BY_PRODUCTS or (is_weights(path.name) and str(relative) not in (INDEX, LEARNT)):
            continue
        elif not os.access(path, os.R_OK):
            raise UserError(f"{path} cannot be read: finish the download, or change its permissions")
        elif path.is_file():  # not a pipe or the like
            yield relative
