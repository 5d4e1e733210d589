"""The licence in a checkpoint's model card, which also applies to checkpoints made from it."""

import re
from pathlib import Path

import yaml

KEYS = ("license", "license_name", "license_link")
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def licence_of(card: str) -> dict[str, str | list[str]]:
    """The licence keys in the YAML front matter of a model card; empty if it names none or is malformed."""
    front_matter = FRONT_MATTER.match(card)
    if not front_matter:
        return {}
    try:
        values = yaml.safe_load(front_matter[1])
    except Exception:  # malformed tags and numbers raise many types besides YAMLError
        return {}
    if not isinstance(values, dict) or not _named(values.get("license")):
        return {}
    return {key: values[key] for key in KEYS if _named(values.get(key))}


def source_licence(directory: Path) -> dict[str, str | list[str]]:
    """`licence_of` the README.md of a checkpoint; empty if there is none or it cannot be read."""
    try:
        return licence_of((directory / "README.md").read_text(encoding="utf-8-sig", errors="replace"))
    except OSError:
        return {}


def _named(value) -> bool:
    """Whether a value is text or a list of texts; YAML reads a bare `no` as false."""
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(isinstance(part, str) and part.strip() for part in parts)
