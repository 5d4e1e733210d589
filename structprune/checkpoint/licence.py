"""The licence that a checkpoint's model card names, which holds for what is made of it."""

import re
from pathlib import Path

import yaml

KEYS = ("license", "license_name", "license_link")
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def licence_of(card: str) -> dict[str, str | list[str]]:
    """The licence keys in the YAML front matter of a model card; none where it names none or is malformed."""
    found = FRONT_MATTER.match(card)
    if not found:
        return {}
    try:
        values = yaml.safe_load(found[1])
    except Exception:  # tags and numbers that are not what they say raise a dozen types beside YAMLError
        return {}
    if not isinstance(values, dict) or not _named(values.get("license")):
        return {}
    return {key: values[key] for key in KEYS if _named(values.get(key))}


def source_licence(directory: Path) -> dict[str, str | list[str]]:
    """`licence_of` the README.md of a checkpoint; none where there is none that can be read."""
    try:
        return licence_of((directory / "README.md").read_text(encoding="utf-8-sig", errors="replace"))
    except OSError:
        return {}


def _named(value) -> bool:
    """Text or a list of it; YAML takes a bare `no` for false."""
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(isinstance(part, str) and part.strip() for part in parts)
