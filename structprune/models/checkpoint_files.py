"""The files of a checkpoint directory: config, shards and safetensors headers, checked before any weight is read."""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
from safetensors import SafetensorError, safe_open

from structprune.errors import UserError
from structprune.files import first_line

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "tokenizer.model",
)  # fmt: skip
SETTINGS_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model", "README.md")
WEIGHT_FILE = re.compile(r".*\.(safetensors|bin|pt|pth)$")
UNREAD_WEIGHTS = (
    "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.tflite",
)  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """Shape and safetensors dtype name of one stored tensor, and its place in the shard's file."""

    shape: tuple[int, ...]
    dtype: str
    shard: str
    span: tuple[int, int] = (0, 0)  # first byte, and the one after the last; (0, 0) where the file is not local


def locate(source: str | Path, weights: bool = True, allow_pickle: bool = False, code: bool = False) -> Path:
    """The directory of a checkpoint given as a path or a Hub id (downloaded without any Python file).

    Args:
        weights: also download weights; config and tokenizer files are always downloaded.
        allow_pickle: download `.bin` shards where there are no safetensors.
        code: also download Python files, which are never run, and all other files but weights, to copy to an output.
    Raises:
        UserError: no such directory, or the Hub cannot be reached or does not have it.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UserError(f"no checkpoint directory at '{source}': give one with config.json, or a Hub id (org/name)")
    patterns = ["*.safetensors"] if weights else []
    directory = _snapshot(str(source), patterns, code)
    if weights and allow_pickle and not any(directory.glob("*.safetensors")):
        directory = _snapshot(str(source), [*patterns, "*.bin"], code)
    return directory


def _snapshot(hub_id: str, weights: list[str], code: bool) -> Path:
    """Download settings and the weights of some patterns; with `code` everything but weights of other patterns."""
    patterns: dict[str, Any] = {"allow_patterns": [*SETTINGS_PATTERNS, *weights]}
    if code:
        patterns = {"ignore_patterns": sorted({"*.safetensors", "*.bin", *UNREAD_WEIGHTS}.difference(weights))}
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, **patterns))
    except Exception as error:  # the Hub client raises a dozen types, all meaning the same to the user
        message = f"'{hub_id}' is neither a directory nor a Hub checkpoint that can be reached ({first_line(error)})"
        raise UserError(message) from error


def is_byte_pair(directory: Path) -> bool:
    """Whether the tokenizer consists of vocab.json and merges.txt only, as Dream's does."""
    files = [(directory / name).exists() for name in ("vocab.json", "merges.txt", "tokenizer.json")]
    return files == [True, True, False]


def is_weights(name: str) -> bool:
    """Whether a file's name is that of weights in any format, or of an index of such files."""
    name = name.lower().removesuffix(".index.json")
    return bool(WEIGHT_FILE.match(name)) or any(name.endswith(pattern.lstrip("*")) for pattern in UNREAD_WEIGHTS)


def read_json(path: Path, remedy: str = "download it again") -> dict:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, or is not a JSON object; with a `remedy` for damaged files.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the checkpoint is incomplete, {remedy}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def shard_names(directory: Path, allow_pickle: bool = False) -> list[str]:
    """The weight files of a checkpoint, in order.

    Raises:
        UserError: there is none, one that the index names is missing, or all are pickled and `allow_pickle` is off.
    """
    if names := _named_shards(directory, "model.safetensors"):
        return names
    present = sorted(path.name for path in directory.iterdir() if WEIGHT_FILE.match(path.name))
    pickled = [name for name in present if name.endswith(".bin")]
    if pickled and allow_pickle:
        return _named_shards(directory, "pytorch_model.bin") or pickled
    if pickled:
        remedy = "convert them to safetensors, or allow them with --allow-pickle (in Python and lm-eval: allow_pickle)"
        raise UserError(f"{directory} has only pickled weights ({pickled[0]}): {remedy}")
    if present:
        missing = "neither model.safetensors nor its index"
        raise UserError(f"{directory} has {present[0]} but {missing}: finish the download")
    raise UserError(f"{directory} has no weights (model.safetensors or an index with its shards): download them")


def _named_shards(directory: Path, whole: str) -> list[str]:
    """The shards that the index of the file `whole` names, else `whole` itself where it exists, else none."""
    index = directory / f"{whole}.index.json"
    if not index.exists():
        return [whole] if (directory / whole).exists() else []
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} names no shards: download it again")
    names = sorted(set(places.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} names {outside[0]}, which is not in its folder: download it again")
    if missing := ", ".join(name for name in names if not (directory / name).exists()):
        raise UserError(f"{directory} lacks {missing} ({len(names)} shards in the index): finish the download")
    return names


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Names, shapes and dtypes in a safetensors file, without reading any weight.

    Raises:
        UserError: the file is cut short or not a safetensors file.
    """
    path.open("rb").close()  # a file that cannot be opened is not called damaged
    try:
        with safe_open(path, "pt"):  # checks the header, and the file's size against it
            pass
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        reason = f"cut short or not a safetensors file ({size:,} bytes)"
        raise UserError(f"{path} is {reason}: download it again") from error
    with path.open("rb") as file:
        entries, start = raw_header(file)
    entries.pop("__metadata__", None)
    return {
        name: TensorHeader(tuple(entry["shape"]), entry["dtype"], path.name, (start + begin, start + end))
        for name, entry in entries.items()
        for begin, end in [entry["data_offsets"]]
    }


def raw_header(file: BinaryIO) -> tuple[dict, int]:
    """The header of a valid safetensors file, and the byte at which its tensors start."""
    (length,) = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(length)), 8 + length


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
