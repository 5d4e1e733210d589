"""Official checkpoint directory or Hub id -> our model; no code from the checkpoint is executed."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from structprune.errors import UserError, shown
from structprune.files import check_regular
from structprune.models.checkpoint_files import locate, read_config, shard_names
from structprune.models.config_values import quantisation
from structprune.models.families import Family
from structprune.models.finite import all_finite
from structprune.models.headers import TensorHeader, read_headers
from structprune.models.joined import split_stored
from structprune.models.maps import DTYPES, give_back, map_shard
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.official import build_config, detect_family, find_mask_id, with_block_size
from structprune.models.placement import pick_device
from structprune.models.tokenizer import check_tokenizer_files

CHECKED = 2**24  # numbers that are looked at together
UNUSED = "inv_freq"  # end of the names of rotary tables, which some checkpoints store and structprune computes


@dataclass(frozen=True)
class Source:
    """Where a model came from."""

    directory: Path
    values: dict  # contents of config.json
    dtype: torch.dtype  # of the stored weights
    name: str = ""  # the Hub id, or the directory's own name
    joins: bool = False  # its files hold weights in one that the model has apart (`Family.joined`)


def source_of(model: DiffusionLM) -> Source:
    """Where a model was loaded from.

    Raises:
        UserError: it was not loaded from a checkpoint.
    """
    if getattr(model, "source", None) is None:
        raise UserError("the model has no source checkpoint: load it with structprune.load_model")
    return model.source


def as_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name ("bfloat16"); None and dtypes pass through.

    Raises:
        UserError: not a floating-point dtype's name.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    value = getattr(torch, str(name), None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise UserError(f"unknown dtype '{name}': give float32, bfloat16 or float16")
    return value


def source_name(source: str | Path, directory: Path) -> str:
    """A checkpoint's name for reports: the Hub id, or the directory's own name."""
    return directory.resolve().name if Path(source).is_dir() else str(source)


def load_config(
    source: str | Path,
    mask_id: int | None = None,
    weights: bool = False,
    allow_pickle: bool = False,
    code: bool = False,
    block_size: int | None = None,
) -> tuple[Path, Family, Any, dict]:
    """Directory, family, configuration and contents of config.json; reads it and the tokenizer's settings only.

    Args:
        mask_id, block_size: of `load_model`; the contents that are returned have the latter.
        weights, allow_pickle, code: what to download of a Hub id (`locate`).
    """
    directory = locate(source, weights, allow_pickle, code)
    values = with_block_size(read_config(directory), block_size, directory)
    family = detect_family(values, directory)
    check_tokenizer_files(directory)
    config = build_config(values, family, find_mask_id(values, directory, mask_id), directory)
    return directory, family, config, values


def load_model(
    source: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    mask_id: int | None = None,
    allow_pickle: bool = False,
    code: bool = False,
    block_size: int | None = None,
) -> DiffusionLM:
    """Load an official checkpoint of a family in `models/families.py`, or one that structprune wrote.

    Args:
        source: directory, or Hub id.
        dtype: of the weights in memory; default float32 on CPU (bf16 products are far slower there), the
            checkpoint's own on an accelerator; "auto": the checkpoint's own anywhere.
        device: default CPU.
        mask_id: where neither config nor tokenizer has the mask token's id.
        allow_pickle: also read `.bin` shards, with `torch.load(weights_only=True)`.
        code: also download a Hub id's Python and other files (`locate`), for outputs that keep them.
        block_size: tokens of a block, of a block diffusion checkpoint whose config.json does not say so.
    Returns:
        A `transformers.PreTrainedModel` in eval mode; `model.source` says where it came from.
    Raises:
        UserError: anything wrong with the checkpoint, or a device this machine does not have, in one line.
    """
    directory, family, config, values = load_config(source, mask_id, True, allow_pickle, code, block_size)
    device = torch.device("cpu") if device is None else pick_device(str(device))
    with torch.device("meta"):
        model = family.model_class(config)
    names = shard_names(directory, allow_pickle)
    if not names[0].endswith(".bin"):
        headers = read_headers(directory, names)
        check_dtypes(headers, values, directory)
        check_shapes(model, split_stored(model, headers, directory), directory)
    chosen = torch.float32 if dtype is None and device.type == "cpu" else as_dtype(None if dtype == "auto" else dtype)
    state, joins = dict[str, torch.Tensor](), False
    dtypes: list[torch.dtype] = []  # of the first shard's tensors as stored
    for name in names:  # cast shard by shard, so that no second copy of the whole model is in memory
        shard, joined = _read_split(model, directory / name, values)
        joins |= joined
        dtypes = dtypes or [tensor.dtype for tensor in shard.values()]
        stored = max(dtypes, key=dtypes.count)
        state |= {key: shard.pop(key).to(device, chosen or stored) for key in list(shard)}
    check_shapes(model, state, directory)
    check_followers(model, state, directory)
    model.load_state_dict({name: state.pop(name) for name in model.stored_state()}, assign=True)
    model.config.dtype = chosen or stored
    model.source = Source(directory, values, stored, source_name(source, directory), joins)
    return model.eval()


def map_model(
    source: str | Path,
    dtype: str | torch.dtype | None = None,
    mask_id: int | None = None,
    code: bool = False,
    block_size: int | None = None,
) -> DiffusionLM:
    """As `load_model`, for a model larger than memory: its weights stay in the checkpoint's files, which must not
    change. For runs with `memory.offload = disk`, which read them layer by layer.

    Every weight is read once, to see that it is sound.

    Args:
        dtype: to compute in; default float32, "auto": the checkpoint's own.
        mask_id, code, block_size: as in `load_model`.
    Raises:
        UserError: as `load_model`; weights that are not in safetensors files.
    """
    directory, family, config, values = load_config(source, mask_id, True, False, code, block_size)
    with torch.device("meta"):
        model = family.model_class(config)
    names = shard_names(directory)
    raw = read_headers(directory, names)
    headers = split_stored(model, raw, directory)
    check_dtypes(headers, values, directory)
    check_shapes(model, headers, directory)
    needed = model.state_dict().keys()
    dtypes = [DTYPES[headers[name].dtype] for name in headers if name in needed]
    stored = max(dtypes, key=dtypes.count)
    chosen = as_dtype(stored if dtype == "auto" else dtype) or torch.float32
    state: dict[str, torch.Tensor] = {}
    for shard in names:
        own = {key: each for key, each in headers.items() if each.shard == shard and key in needed}
        state |= map_shard(directory / shard, own, chosen)
    for key, tensor in state.items():
        _check_finite(directory / headers[key].shard, key, tensor)
    check_followers(model, state, directory)
    model.load_state_dict({name: state[name] for name in model.stored_state()}, assign=True)
    model.config.dtype = chosen
    model.source = Source(directory, values, stored, source_name(source, directory), headers.keys() != raw.keys())
    return model.eval()


def check_shapes(
    model: DiffusionLM, stored: Mapping[str, TensorHeader] | Mapping[str, torch.Tensor], directory: Path
) -> None:
    """Compare the shapes of stored tensors with the model that the config describes.

    Raises:
        UserError: one is missing, unknown, or has another shape.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if name not in stored and name in model.followers:
            continue
        if name not in stored:
            raise UserError(f"{directory}: the weights lack {name}, which config.json asks for")
        shape, described = tuple(stored[name].shape), tuple(tensor.shape)
        if shape != described:
            raise UserError(f"{directory}: {name} is {shape}, but config.json asks for {described}")
    if extra := [name for name in stored if name not in state and not name.endswith(UNUSED)]:
        count, first = len(extra), extra[0]
        raise UserError(f"{directory}: {count} weights are not in the model config.json describes (first: {first})")


def check_followers(model: DiffusionLM, state: dict[str, torch.Tensor], directory: Path) -> None:
    """Raise UserError where a file holds other values for a weight than for the one that it is by config.json."""
    for name, leader in model.followers.items():
        if name in state and not torch.equal(state[name], state[leader]):
            remedy = "set tie_word_embeddings to false there"
            raise UserError(f"{directory}: {name} is not {leader}, but config.json says that they are one: {remedy}")


def check_dtypes(
    stored: Mapping[str, TensorHeader] | Mapping[str, torch.Tensor], values: dict, directory: Path
) -> None:
    """Check that every stored tensor is of a floating-point dtype that structprune computes with.

    Args:
        values: contents of config.json, which name the method where weights are quantised.
    Raises:
        UserError: one has another dtype.
    """
    for name, tensor in stored.items():
        dtype = tensor.dtype
        if dtype in DTYPES or dtype in DTYPES.values() or name.endswith(UNUSED):
            continue
        method = quantisation(values)
        kind = str(dtype).removeprefix("torch.") + (f", quantised with {method}" if method else "")
        raise UserError(
            f"{directory}: {shown(name)} is {kind}, but weights must be one of {', '.join(DTYPES)}: give the checkpoint"
            " as it was before it was quantised or converted"
        )


def _read_split(model: DiffusionLM, path: Path, values: dict) -> tuple[dict[str, torch.Tensor], bool]:
    """A shard's tensors under the model's own names, and whether it joins any."""
    raw = _read_shard(path, values)
    shard = split_stored(model, raw, path)
    return shard, shard.keys() != raw.keys()


def _read_shard(path: Path, values: dict) -> dict[str, torch.Tensor]:
    try:
        state = read_pickle(path) if path.suffix == ".bin" else load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}): download it again") from error
    check_dtypes(state, values, path)
    for name, tensor in state.items():
        _check_finite(path, name, tensor)
    return state


def _check_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise UserError for a weight that holds NaN or Inf, some rows of it at a time."""
    if tensor.is_floating_point():
        for part in tensor.detach().flatten().split(CHECKED):
            if not all_finite(part):
                raise UserError(f"{path}: {name} holds NaN or Inf: the shard is damaged, download it again")
            give_back(part)


def read_pickle(path: Path, mapped: bool = False) -> dict[str, torch.Tensor]:
    """The state dict in a `.bin` shard, on the CPU.

    Args:
        mapped: leave tensors on disk until they are used, where the file's format allows it.
    Raises:
        UserError: the file is damaged, or holds more than tensors.
    """
    check_regular(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except Exception as error:  # a cut archive and a pickle that holds more than weights raise unrelated types
        reason = f"cut short or holds more than weights ({type(error).__name__})"
        raise UserError(f"{path} is {reason}: not loaded, download it again as safetensors") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path} is not a state dict of tensors: not loaded, download it again as safetensors")
    return state
