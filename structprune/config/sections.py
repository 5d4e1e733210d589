"""Configurations made of sections: validated, frozen, no unknown keys; read from YAML and `section.key=value`."""

from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import Self

from structprune.config.yaml_files import parse_yaml, read_yaml
from structprune.errors import UserError, nearest, shown

AnySection = TypeVar("AnySection", bound="Section")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info) -> Any:
        """Python takes true for 1; who writes `windows: true` means something else."""
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise PydanticCustomError("number", "Input should be a number, not true or false")
        return value


def within_positions(section: AnySection, positions: int) -> AnySection:
    """A section of windows that a model of so many positions takes: `length` is lowered where nobody named one."""
    if "length" in section.model_fields_set or getattr(section, "length") <= positions:  # noqa: B009
        return section
    return section.model_copy(update={"length": positions})


class Sections(Section):
    """A configuration: fields that are sections, and a few of its own (`scalars`)."""

    scalars: ClassVar[tuple[str, ...]] = ()
    """Keys that belong to no section."""

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: list[str] | dict[str, Any] | None = None) -> Self:
        """Read a YAML file and apply overrides, `["structured.ratio=0.3"]` or `{"structured.ratio": 0.3}`.

        Raises:
            UserError: no such file, not YAML, an unknown key (with the nearest known one), or a value out of range.
        """
        values: dict = {}
        if path is not None:
            content = read_yaml(path, "config file")
            values = {} if content is None else content  # an empty file
            if not isinstance(values, dict):
                raise UserError(f"{path} is not a mapping of sections: give {', '.join(cls.model_fields)}")
        changes = overrides if isinstance(overrides, dict) else cls.parse(overrides or [])
        for name, value in changes.items():
            section, _, key = name.partition(".")
            if name in cls.scalars:
                values[name] = value
                continue
            if not key:
                raise UserError(f"'{name}' names no section: write section.key=value, such as structured.ratio=0.3")
            branch = values.setdefault(section, {})
            if not isinstance(branch, dict):
                raise UserError(f"{path}: '{section}' is not a mapping: write its keys indented below it")
            branch[key] = value
        return cls.build(values)

    @classmethod
    def with_options(cls, path: str | Path | None, sets: list[str] | None, options: dict[str, Any]) -> Self:
        """As `load`, with `--set` over the file, and over both the options that name a key, where they are not None."""
        given = {key: value for key, value in options.items() if value is not None}
        return cls.load(path, cls.parse(sets or []) | given)

    @classmethod
    def parse(cls, overrides: list[str]) -> dict[str, Any]:
        """`["section.key=value"]`, values in YAML, as a mapping; the last of several for one key counts.

        Raises:
            UserError: no "=", or a value that is not YAML.
        """
        changes = {}
        for text in overrides:
            name, equals, value = text.partition("=")
            if not equals:
                raise UserError(f"{shown(text)} is not key=value: write section.key=value")
            try:
                changes[name.strip()] = parse_yaml(value)
            except ValueError as error:
                raise UserError(f"the value of {shown(text)} cannot be read as YAML: quote it") from error
        return changes

    @classmethod
    def build(cls, values: dict) -> Self:
        """Validate nested plain values.

        Raises:
            UserError: an unknown key or a bad value.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(cls._explain(error.errors()[0])) from error

    @classmethod
    def known_keys(cls) -> list[str]:
        """Every key, as `section.key` (scalars have no section)."""
        sections = {name: cls._section(name) for name in cls.model_fields if name not in cls.scalars}
        return [*cls.scalars, *(f"{name}.{key}" for name, section in sections.items() for key in section.model_fields)]

    @classmethod
    def _section(cls, name: str) -> type[Section]:
        """The class of a section."""
        section = cls.model_fields[name].annotation
        assert isinstance(section, type) and issubclass(section, Section), name
        return section

    @classmethod
    def _explain(cls, problem: ErrorDetails) -> str:
        name = ".".join(str(part) for part in problem["loc"][:2])
        if problem["type"] == "extra_forbidden":
            if len(problem["loc"]) < 2:  # also a name with a dot in it
                names = list(cls.model_fields)
                close = nearest(name[:80], names, 0.8)
                return f"unknown config section {shown(name)}{close}: choose from {', '.join(names)}"
            section, key = map(str, problem["loc"][:2])
            inside = cls._section(section).model_fields
            close = nearest(key[:80], list(inside)) or nearest(name[:80], cls.known_keys())
            return f"unknown config key {shown(name)}{close}"
        return f"config key {name} = {shown(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
