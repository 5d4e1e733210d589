"""A checkpoint directory as files: config, shards and safetensors headers, checked before any weight is read."""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from structprune.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "tokenizer.model",
)  # fmt: skip
WEIGHT_FILE = re.compile(r".*\.(safetensors|bin|pt|pth)$")


@dataclass(frozen=True)
class TensorHeader:
    """Shape and safetensors dtype name of one stored tensor, and the shard it is in."""

    shape: tuple[int, ...]
    dtype: str
    shard: str


def locate(source: str | Path) -> Path:
    """The directory of a checkpoint given as a path or a Hub id (downloaded without any Python file).

    Raises:
        UserError: no such directory, or the Hub does not give it.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UserError(f"no checkpoint directory at '{source}': give a directory with config.json, or a Hub id (org/name)")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # the Hub client raises a dozen types, all meaning the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"'{source}' is neither a directory nor a Hub checkpoint that can be reached ({reason})") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the checkpoint is incomplete, download it again") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def shard_names(directory: Path, allow_pickle: bool = False) -> list[str]:
    """The weight files of a checkpoint, in order.

    Raises:
        UserError: none there, one named by the index missing, or only pickled ones and `allow_pickle` is off.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise UserError(f"{directory} lacks {', '.join(missing)} ({len(names)} shards in the index): finish the download")
        return names
    if (directory / "model.safetensors").exists():
        return ["model.safetensors"]
    present = sorted(path.name for path in directory.iterdir() if WEIGHT_FILE.match(path.name))
    pickled = [name for name in present if name.endswith(".bin")]
    if pickled and not allow_pickle:
        raise UserError(f"{directory} has only pickled weights ({pickled[0]}): convert to safetensors or allow with --allow-pickle")
    if pickled:
        return pickled
    if present:
        raise UserError(f"{directory} has {present[0]} but neither model.safetensors nor its index: finish the download")
    raise UserError(f"{directory} has no weights (model.safetensors or an index with its shards)")


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Names, shapes and dtypes in a safetensors file, without reading any weight.

    Raises:
        UserError: the file is cut short or is no safetensors file.
    """
    size = path.stat().st_size
    broken = UserError(f"{path} is cut short or not a safetensors file ({size:,} bytes): download it again")
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise broken
        length = struct.unpack("<Q", prefix)[0]
        if length > min(size - 8, 100_000_000):
            raise broken
        try:
            entries = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise broken from error
    entries.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if 8 + length + end != size:
        raise broken
    return {name: TensorHeader(tuple(e["shape"]), e["dtype"], path.name) for name, e in entries.items()}


def read_headers(directory: Path, names: list[str]) -> dict[str, TensorHeader]:
    """Every tensor's header over all safetensors shards `names`."""
    headers: dict[str, TensorHeader] = {}
    for name in names:
        headers |= read_header(directory / name)
    return headers
