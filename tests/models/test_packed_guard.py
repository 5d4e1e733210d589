"""Packed weights are refused where the installed releases would leave them random; ordinary models never are."""

import json

import pytest
import torch

from structprune.models import configuration_structprune as module
from structprune.models.configuration_structprune import (
    UNPACKED_BY,
    StructpruneDreamConfig,
    StructpruneLLaDAConfig,
    check_packed,
)
from structprune.models.modeling_structprune import StructpruneDream, StructpruneLLaDA
from structprune.report.export_lines import UNPACKERS

SMALL = {"d_model": 8, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 8, "vocab_size": 16, "mask_token_id": 3}


def settings(layout) -> dict:
    """`quantization_config` as `structprune.checkpoint.packed` writes it."""
    return {"quant_method": "compressed-tensors", "sparsity_config": {"format": layout, "targets": ["a"]}}


@pytest.fixture
def installed(monkeypatch):
    """`installed(transformers, compressed_tensors)`: releases that seem to be there; None: the package is not."""

    def set_releases(transformers, unpacker):
        def version(name):
            assert name == "compressed-tensors"
            if unpacker is None:
                raise module.importlib.metadata.PackageNotFoundError(name)
            return unpacker

        monkeypatch.setattr(module, "transformers_version", transformers)
        monkeypatch.setattr(module.importlib.metadata, "version", version)

    return set_releases


@pytest.mark.parametrize("layout, transformers, unpacker, reads", [
    ("sparse-24-bitmask", "4.51.0", "0.9.4", True),
    ("sparse-24-bitmask", "4.55.4", "0.14.0.1", True),
    ("sparse-24-bitmask", "4.57.6", "0.14.0.1", True),
    ("sparse-24-bitmask", "4.57.6", None, True),  # transformers itself asks for the package
    ("sparse-24-bitmask", "4.57.6", "0.15.0", False),
    ("sparse-24-bitmask", "4.50.3", "0.9.4", False),
    ("sparse-24-bitmask", "5.0.0rc1", "0.14.0.1", False),
    ("sparse-24-bitmask", "5.24.0", "1.0", False),
    ("sparse-bitmask", "4.51.0", "0.9.4", True),
    ("sparse-bitmask", "4.55.4", "0.14.0.1", True),
    ("sparse-bitmask", "4.56.0.dev0", "0.14.0.1", False),
    ("sparse-bitmask", "4.55.4", "0.20.1", False),
    ("sparse-bitmask", "5.24.0", None, False),
])  # fmt: skip
def test_releases(installed, layout, transformers, unpacker, reads):
    installed(transformers, unpacker)
    config = StructpruneLLaDAConfig(**SMALL, quantization_config=settings(layout))
    if reads:
        check_packed(config)
        StructpruneLLaDA(config)
        return
    with pytest.raises(ImportError) as caught:
        StructpruneLLaDA(config)
    found = f"transformers {transformers} with compressed-tensors {unpacker or 'none'}"
    remedy = "pip install transformers==4.55.4 compressed-tensors==0.14.0.1 accelerate"
    assert str(caught.value) == f"weights packed as {layout} are not read by {found}: {remedy}"


def test_transformers_5_that_forgets_the_sparsity_is_refused_too(installed):
    installed("5.24.0", "0.20.1")
    values = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    values |= {"intermediate_size": 8, "vocab_size": 16, "mask_token_id": 3}
    config = StructpruneDreamConfig(**values, quantization_config=settings("sparse-bitmask"))
    config.quantization_config = object()
    with pytest.raises(ImportError, match="^weights packed as sparse-bitmask"):
        StructpruneDream(config)


@pytest.mark.parametrize("given", [
    None, {}, {"quant_method": "compressed-tensors", "sparsity_config": {}},
    {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}, {"quant_method": "torchao"},
])  # fmt: skip
def test_others_are_not_asked_for_releases(installed, monkeypatch, given):
    installed("5.24.0", "0.20.1")
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: pytest.fail("was asked"))
    config = StructpruneLLaDAConfig(**SMALL, **({} if given is None else {"quantization_config": given}))
    assert config.packed_layout is None and isinstance(StructpruneLLaDA(config), torch.nn.Module)


def test_the_config_alone_is_read_and_written_anywhere(installed, tmp_path):
    installed("5.24.0", "0.20.1")
    values = SMALL | {"model_type": "structprune_llada", "quantization_config": settings("sparse-24-bitmask")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = StructpruneLLaDAConfig.from_pretrained(tmp_path)
    assert config.packed_layout == "sparse-24-bitmask"
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "packed_layout" not in again and again["quantization_config"] == settings("sparse-24-bitmask")
    published = StructpruneLLaDAConfig(**SMALL | {"model_type": "llada", "packed_layout": "x"})
    assert published.packed_layout is None and "packed_layout" not in published.to_diff_dict()


def test_the_command_line_names_the_releases_that_the_guard_lets_through():
    for layout, ((major, first), (_, end)) in UNPACKED_BY.items():
        assert UNPACKERS[layout].startswith(f"transformers {major}.{first} to {major}.{end - 1} with")
    assert UNPACKERS.keys() == UNPACKED_BY.keys() and module.DROPPED == (0, 15)
    assert all("compressed-tensors below 0.15 and accelerate" in text for text in UNPACKERS.values())
