"""YAML that would never end, or holds what YAML cannot: one line."""

import os

import pytest

from structprune import Config, UserError
from structprune.config.yaml_files import NODES, parse_yaml, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
REFUSED = {
    "bomb": (BOMB, f"its aliases expand to more than {NODES:,} values"),
    "merges": (
        "b: &b {"
        + ", ".join(f"k{i}: 1" for i in range(2000))
        + "}\n"
        + "".join(f"x{i}: {{<<: *b}}\n" for i in range(99)),
        "its aliases expand to more than",
    ),
    "itself": ("a: &a [*a]\n", "its aliases expand to more than"),
    "nesting": ("[" * 5000 + "]" * 5000, "nested too deeply"),
    "date": ("a: 2020-13-45\n", "month must be in 1..12"),
    "digits": (f"a: {'9' * 5000}\n", "Exceeds the limit"),
    "keys": ("? [a]\n: b\n", "while constructing a mapping"),
    "object": ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    "control": ("a: \x00\n", "unacceptable character"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    text, said = REFUSED[name]
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="a.yaml cannot be read as YAML") as caught:
        read_yaml(tmp_path / "a.yaml", "config file")
    assert said in str(caught.value) and len(str(caught.value)) < 500


def test_aliases_are_fine_otherwise():
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {d: *a}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe or device, not a file"):
        read_yaml(tmp_path / "pipe", "config file")
    (tmp_path / "large.yaml").write_text("# \n" * 400_000)
    with pytest.raises(UserError, match="large.yaml has 1,200,000 bytes, more than any config file"):
        read_yaml(tmp_path / "large.yaml", "config file")


def test_a_value_is_never_shown_whole():
    """A refused value may be nested, or very long."""
    for value in ([["x" * 50] * 50] * 50, "x" * 10_000, {str(key): key for key in range(10_000)}, 10**5000):
        with pytest.raises(UserError, match="config key structured.ratio = ") as caught:
            Config.load(overrides={"structured.ratio": value})
        assert len(str(caught.value)) < 400
