"""Headers of safetensors files: names, shapes, dtypes and places of tensors, checked before any weight is read."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
from safetensors import SafetensorError, safe_open

from structprune.errors import UserError, shown
from structprune.files import check_regular
from structprune.models.checkpoint_files import WEIGHT_FILE, shard_names

BYTES = {  # of one element, by safetensors dtype name
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
LARGEST_HEADER = 100_000_000  # bytes; the safetensors library reads no larger one
ELEMENTS = 1 << 48  # of one tensor: more than any disk holds, and products of sizes stay below 2**63


@dataclass(frozen=True)
class TensorHeader:
    """Shape and safetensors dtype name of one stored tensor, and its place in the shard's file."""

    shape: tuple[int, ...]
    dtype: str
    shard: str
    span: tuple[int, int] = (0, 0)  # first byte, and the one after the last; (0, 0) where the file is not local


def raw_header(file: BinaryIO) -> tuple[dict, int]:
    """The header of a valid safetensors file, and the byte at which its tensors start."""
    (length,) = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(length)), 8 + length


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Names, shapes and dtypes in a safetensors file, without reading any weight.

    Raises:
        UserError: the file is cut short or not a safetensors file, or its header contradicts itself.
    """
    check_regular(path)
    path.open("rb").close()  # a file that cannot be opened is not called damaged
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, LARGEST_HEADER):
                raise ValueError("length")
            entries = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise _unusable(path, size) from error
    if not isinstance(entries, dict):
        raise _unusable(path, size)
    entries.pop("__metadata__", None)
    start = 8 + length
    headers = {name: _tensor_header(path, name, entry, start) for name, entry in entries.items()}
    _check_spans(path, headers, size)
    try:
        with safe_open(path, "pt"):  # what the library itself asks of a file, such as no gaps between tensors
            pass
    except (SafetensorError, OSError) as error:
        raise _unusable(path, size) from error
    return headers


def _unusable(path: Path, size: int) -> UserError:
    return UserError(f"{path} is cut short or not a safetensors file ({size:,} bytes): download it again")


def _tensor_header(path: Path, name: str, entry: Any, start: int) -> TensorHeader:
    """A checked entry; its bytes are counted from the start of the file.

    Raises:
        UserError: a value that is no shape, dtype or place, or a place that is not as long as shape and dtype say.
    """
    values: dict[str, Any] = entry if isinstance(entry, dict) else {}
    shape: Any = values.get("shape")
    dtype: Any = values.get("dtype")
    places: Any = values.get("data_offsets")
    for key, value, valid in (
        ("shape", shape, _whole_numbers(shape) and math.prod(shape) < ELEMENTS),
        ("dtype", dtype, isinstance(dtype, str) and dtype in BYTES),
        ("data_offsets", places, _whole_numbers(places) and len(places) == 2),
    ):
        if not valid:
            raise UserError(f"{path}: the header has {key} = {shown(value)} for {shown(name)}: download it again")
    stored, described = places[1] - places[0], math.prod(shape) * BYTES[dtype]
    if stored != described:
        raise UserError(
            f"{path}: {shown(name)} takes {stored:,} bytes, but {dtype} of shape {shape} takes {described:,}:"
            " download it again"
        )
    return TensorHeader(tuple(shape), dtype, path.name, (start + places[0], start + places[1]))


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < ELEMENTS for value in values)


def _check_spans(path: Path, headers: dict[str, TensorHeader], size: int) -> None:
    """Raise UserError where tensors share bytes, or reach beyond the file."""
    ordered = sorted(headers.items(), key=lambda item: item[1].span)
    for (name, header), (other, following) in zip(ordered, ordered[1:]):
        if header.span[1] > following.span[0]:
            raise UserError(f"{path}: {shown(name)} and {shown(other)} share bytes: download it again")
    if ordered and max(header.span[1] for header in headers.values()) > size:
        raise _unusable(path, size)


def read_headers(directory: Path, names: list[str]) -> dict[str, TensorHeader]:
    """Every tensor's header in the safetensors shards `names`."""
    return {key: header for name in names for key, header in read_header(directory / name).items()}


def stored_headers(source: str | Path, directory: Path, allow_pickle: bool = False) -> dict[str, TensorHeader]:
    """Every tensor's header, without reading any weight; none of a config.json alone, or of pickled weights.

    Args:
        source: as the user gave it; the headers of a Hub id without local shards are fetched from the Hub.
        directory: what `locate(source)` returns.
    Raises:
        UserError: shards that are broken or missing.
    """
    local = [path.name for path in directory.iterdir() if WEIGHT_FILE.match(path.name)]
    if not local and not Path(source).is_dir():
        return _hub_headers(str(source))
    if not local and not list(directory.glob("*.index.json")):
        return {}
    names = shard_names(directory, allow_pickle)
    return read_headers(directory, names) if names[0].endswith(".safetensors") else {}


def _hub_headers(hub_id: str) -> dict[str, TensorHeader]:
    """Headers by range requests of a few kilobytes per shard; none where the Hub does not return them."""
    try:
        files = huggingface_hub.get_safetensors_metadata(hub_id).files_metadata
    except Exception:  # offline, no safetensors, or a header that cannot be parsed: config.json must do
        return {}
    return {
        name: TensorHeader(tuple(tensor.shape), tensor.dtype, shard)
        for shard, file in files.items()
        for name, tensor in file.tensors.items()
    }
