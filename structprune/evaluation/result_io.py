"""The JSON of results, refused in one line where it is damaged."""

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from structprune.errors import UserError
from structprune.evaluation.results import Row, from_json

FORMAT = 1  # of the files; raised when a reader of the old ones would be misled


def json_text(values: dict) -> bytes:
    """A whole file, to be read by people too."""
    return json.dumps({"format": FORMAT, **values}, indent=2, ensure_ascii=False).encode() + b"\n"


def json_line(values: dict) -> bytes:
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def read_object(path: Path) -> dict:
    """What `json_text` wrote.

    Raises:
        UserError: it is damaged, or of another format.
    """
    try:
        found = json.loads(path.read_bytes())
        form, settings = found["format"], found["settings"]
        if not isinstance(settings, dict):
            raise TypeError("settings")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is damaged: evaluate again with --overwrite") from error
    if form != FORMAT:
        raise UserError(f"'{path}' is of format {form}, this version reads {FORMAT}: evaluate again with --overwrite")
    return found


def parse_line(line: bytes, path: Path, number: int, needed: Mapping[str, type | tuple] = MappingProxyType({})) -> dict:
    """Line `number` of a .jsonl file.

    Args:
        needed: keys it must have, and of what type.
    Raises:
        UserError: it is no JSON object with the needed keys.
    """
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in needed.items()):
        raise UserError(f"line {number} of '{path}' is damaged: evaluate again with --overwrite")
    return found


def read_rows(path: Path, count: int) -> list[Row]:
    """The rows of a file of `count` items.

    Raises:
        UserError: the file is missing, damaged or of another length.
    """
    if not path.is_file():
        raise UserError(f"'{path}' is missing: evaluate again with --overwrite")
    lines = path.read_bytes().splitlines()
    if len(lines) != count:
        raise UserError(f"'{path}' has {len(lines)} items instead of {count}: evaluate again with --overwrite")
    return [from_json(parse_line(line, path, number)) for number, line in enumerate(lines, 1)]


@contextmanager
def plain_os_errors(path: Path) -> Iterator[None]:
    """Around writing: a full disk, or a place that may not be written, is a UserError."""
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
