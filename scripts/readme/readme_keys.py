"""The tables of configuration keys, from the pydantic models and the docstrings under their fields."""

import ast
import inspect
import textwrap
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from scripts.readme.readme_common import table
from structprune.config import Section

KINDS = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", dict: "mapping"}
LISTS = {float: "list of numbers", str: "list of texts"}
LIMITS = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}  # of annotated_types, in the order they are said


def keys(section: str, model: type[Section]) -> str:
    """A row for every key of a section: default, values and meaning."""
    meanings = field_docstrings(model)
    rows = [
        [f"`{section}.{name}`", default(field), values(field), cell(meanings.get(name, ""))]
        for name, field in model.model_fields.items()
    ]
    return table(["key", "default", "values", "meaning"], rows, others="---")


def field_docstrings(model: type[Section]) -> dict[str, str]:
    """Field -> the string literal under it in the source of the class, on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(model)))
    (definition,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    docstrings = {}
    for pair in pairwise(definition.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docstrings[name] = " ".join(text.split())
    return docstrings


def cell(text: str) -> str:
    """Text as a cell of a table, in which a bar would end it."""
    return text.replace("|", "\\|")


def default(field: FieldInfo) -> str:
    """A field's default as YAML has it; a dash for none."""
    value = field.default
    if value is None:
        return "-"
    if isinstance(value, (tuple, list)):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def values(field: FieldInfo) -> str:
    """What a field takes: its choices, or its kind and limits."""
    limits = {name: getattr(each, name) for each in field.metadata for name in LIMITS if hasattr(each, name)}
    said = " ".join(f"{word} {_number(limits[name])}" for name, word in LIMITS.items() if limits.get(name) is not None)
    return " ".join(filter(None, [_kind(field.annotation), said]))


def _number(value: float) -> str:
    """A limit; the large ones are powers of two."""
    return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value >= 1 << 32 else str(value)


def _kind(annotation: Any) -> str:
    """A type in words: `int | Literal["auto"] | None` -> "`auto`, whole number"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if annotation in KINDS or origin in KINDS:
        return KINDS[annotation if annotation in KINDS else origin]
    if origin in (tuple, list) and get_origin(arguments[0]) is Literal:
        return f"list of {_kind(arguments[0])}"
    if origin in (tuple, list):
        return LISTS[getattr(arguments[0], "__origin__", arguments[0])]  # of Annotated[float, ...] too
    return " or ".join(_kind(part) for part in arguments if part is not NoneType)
