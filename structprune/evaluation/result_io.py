"""The JSON of results; a damaged file is a UserError."""

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from structprune.errors import UserError
from structprune.evaluation.results import Row, from_json

FORMAT = 1  # raised when older readers would misread the files
DAMAGED = "evaluate again with --overwrite"


def json_text(values: dict) -> bytes:
    """The contents of a whole file, indented for people."""
    return json.dumps({"format": FORMAT, **values}, indent=2, ensure_ascii=False).encode() + b"\n"


def json_line(values: dict) -> bytes:
    """A line of a .jsonl file."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def read_object(path: Path) -> dict:
    """What `json_text` wrote.

    Raises:
        UserError: it is damaged, or of another format.
    """
    try:
        values = json.loads(path.read_bytes())
        version, settings = values["format"], values["settings"]
        if not isinstance(settings, dict):
            raise TypeError("settings")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is damaged: {DAMAGED}") from error
    if version != FORMAT:
        raise UserError(f"'{path}' has format {version}, and this version reads {FORMAT}: {DAMAGED}")
    return values


def parse_line(line: bytes, path: Path, number: int, types: Mapping[str, Any] = MappingProxyType({})) -> dict:
    """Line `number` of a .jsonl file.

    Args:
        types: keys that it must have -> type or types of the value.
    Raises:
        UserError: it is not a JSON object with these keys.
    """
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not all(isinstance(values.get(name), each) for name, each in types.items()):
        raise UserError(f"line {number} of '{path}' is damaged: {DAMAGED}")
    return values


def read_rows(path: Path, count: int) -> list[Row]:
    """The rows of a file of `count` items.

    Raises:
        UserError: the file is missing, damaged or of another length.
    """
    if not path.is_file():
        raise UserError(f"'{path}' is missing: {DAMAGED}")
    lines = path.read_bytes().splitlines()
    if len(lines) != count:
        raise UserError(f"'{path}' has {len(lines)} items instead of {count}: {DAMAGED}")
    return [from_json(parse_line(line, path, number)) for number, line in enumerate(lines, 1)]


@contextmanager
def plain_os_errors(path: Path) -> Iterator[None]:
    """While writing `path`: a full disk, or a path that cannot be written, is a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left while writing '{path}': make room and run the same command again"
            ) from error
        if isinstance(
            error, (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError)
        ) or error.errno in (errno.EROFS, errno.ENAMETOOLONG):
            raise UserError(f"output '{path}' cannot be written ({error.strerror}): choose another --out") from error
        raise
