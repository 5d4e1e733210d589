"""The files of a checkpoint directory: where they are, which of them count, and config.json."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub

from structprune.errors import UserError, shown
from structprune.files import check_regular, first_line

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "tokenizer.model",
)  # fmt: skip
SETTINGS_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model", "README.md")
WEIGHT_FILE = re.compile(r".*\.(safetensors|bin|pt|pth)$")
UNREAD_WEIGHTS = (
    "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.tflite",
)  # fmt: skip
LARGEST, LARGEST_LIST = 1 << 22, 1 << 26  # bytes of a settings file, and of one that lists a vocabulary or a model
LISTS = re.compile(r"tokenizer\.(json|model)|vocab\.json|merges\.txt|.*\.index\.json|.*plan.*\.json")
HALF_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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


def file_beside(source: str | Path, directory: Path, name: str) -> Path:
    """The place of a file that is no settings and no weights, downloaded of a Hub id; the file may not be there.

    Args:
        directory: what `locate(source)` returns.
    Raises:
        UserError: the Hub cannot be reached.
    """
    if not Path(source).is_dir() and not (directory / name).exists():
        directory = _snapshot(str(source), [name])
    return directory / name


def _snapshot(hub_id: str, weights: list[str], code: bool = False) -> Path:
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


def check_file(path: Path, remedy: str = "download it again") -> None:
    """Raise UserError for a settings file that is none, or larger than any such file."""
    check_regular(path)
    size = path.stat().st_size
    if size > (LARGEST_LIST if LISTS.fullmatch(path.name) else LARGEST):
        raise UserError(f"{path} has {size:,} bytes, more than any such file: {remedy}")


def read_json(path: Path, remedy: str = "download it again") -> dict:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, or is not a JSON object of a sane size; with a `remedy` for damaged files.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: the checkpoint is incomplete, {remedy}")
    check_file(path, remedy)
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if HALF_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # a half of a pair could not be written again
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be read: {remedy}") from error
    except ValueError as error:  # also what is not UTF-8, and numbers of thousands of digits
        raise UserError(f"{path} is not valid JSON ({first_line(error)}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {shown(value)}, not an object: {remedy}")
    return value


def read_config(directory: Path) -> dict:
    """The contents of a checkpoint's config.json.

    Raises:
        UserError: it is missing or damaged, or the directory is a PEFT adapter.
    """
    if not (directory / "config.json").exists() and (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} is a PEFT adapter, not a model: merge it into its base model first (merge_and_unload, then"
            " save_pretrained)"
        )
    return read_json(directory / "config.json")


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
    """`whole` itself where it exists, as transformers chooses, else the shards that its index names, else none.

    An index beside the whole file is left over from an earlier, sharded save.
    """
    index = directory / f"{whole}.index.json"
    if (directory / whole).exists():
        return [whole]
    if not index.exists():
        return []
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} names no shards: download it again")
    names = sorted(set(places.values()))
    ending = Path(whole).suffix
    if outside := [name for name in names if Path(name).name != name or not name.endswith(ending)]:
        raise UserError(f"{index} names {shown(outside[0])}, not a {ending} file in its folder: download it again")
    if missing := ", ".join(name for name in names if not (directory / name).exists()):
        raise UserError(f"{directory} lacks {missing} ({len(names)} shards in the index): finish the download")
    return names
