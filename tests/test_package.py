"""The package's public names."""

import re

import pytest

import structprune


def test_every_public_name_is_described_and_listed():
    described = re.findall(r"^    ([\w, ]+?)  +\S", structprune.__doc__, re.MULTILINE)
    names = [name for each in described for name in each.split(", ")]
    assert sorted(names) == sorted(structprune.__all__) == dir(structprune) and len(set(names)) == len(names)
    assert all(getattr(structprune, name) is not None for name in names)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        structprune.prunes  # noqa: B018
