"""Ways to break a checkpoint directory, and what is said of it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune import UserError, load_model


@pytest.fixture
def message():
    """`message(directory, **options)` -> the one line that load_model refuses with."""

    def refuse(directory, **options) -> str:
        with pytest.raises(UserError) as caught:
            load_model(directory, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


@pytest.fixture
def change_config():
    """`change_config(directory, **changes)` of config.json -> the directory."""

    def change(directory, **changes):
        values = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(values))
        return directory

    return change


@pytest.fixture
def change_weights():
    """`change_weights(directory, edit)`: `edit` changes the state dict of model.safetensors -> the directory."""

    def change(directory, edit):
        state = load_file(directory / "model.safetensors")
        edit(state)
        save_file(state, directory / "model.safetensors")
        return directory

    return change


@pytest.fixture
def pickled():
    """`pickled(directory)`: its weights move to pytorch_model.bin -> the directory."""

    def convert(directory):
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
        return directory

    return convert
