"""YAML of a user: read whole, without running anything, and refused where reading it would never end."""

from pathlib import Path
from typing import Any

import yaml

from structprune.errors import UserError
from structprune.files import check_regular, first_line

LARGEST = 1 << 20  # bytes; parsing takes a second or two for each of so many
NODES = 100_000  # values and keys, aliases counted as often as they occur


def read_yaml(path: str | Path, kind: str) -> Any:
    """The contents of a YAML file.

    Args:
        kind: what the file is, for error messages.
    Raises:
        UserError: no such file, or not YAML, or more than a file of this kind can hold.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise UserError(f"no {kind} at '{path}': check the path")
        check_regular(path)
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path} has {size:,} bytes, more than any {kind}: give another file")
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a UserError, too
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as YAML ({first_line(error)}): correct it") from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, of plain types.

    Raises:
        ValueError: not YAML, nested too deeply, or aliases that expand to more than `NODES` values.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > NODES:  # before merges (`<<`) copy what they name
            raise ValueError(f"its aliases expand to more than {NODES:,} values")
        value = loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except Exception as error:  # besides YAMLError: dates and numbers that do not exist, keys that cannot be keys
        raise ValueError(first_line(error)) from error
    return value


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """The number of values below a node, those behind an alias counted each time; `sizes` holds those already known."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = NODES + 1  # for a value that holds itself
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]
