"""The JSON of results; a damaged file is a UserError."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from structprune.errors import UserError
from structprune.evaluation.results import Row

FORMAT = 1  # raised when older readers would misread the files
DAMAGED = "evaluate again with --overwrite"
ROW: TypeAdapter[Row] = TypeAdapter(Row)


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


def parse_line(line: bytes, kind: TypeAdapter, path: Path, number: int) -> Any:
    """Line `number` of a .jsonl file as an object of a kind.

    Raises:
        UserError: it is none.
    """
    try:
        return kind.validate_json(line, strict=True)
    except ValidationError as error:
        raise UserError(f"line {number} of '{path}' is damaged: {DAMAGED}") from error


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
    return [parse_line(line, ROW, path, number) for number, line in enumerate(lines, 1)]


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
