"""Tensors in files: what is mapped, how a weight is kept, and whose pages are given back."""

import gc
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from structprune.errors import UserError
from structprune.models.headers import read_header
from structprune.models.loading import load_model, map_model
from structprune.models.maps import (
    file_tensor,
    give_back,
    give_back_pages,
    in_place_of,
    map_shard,
    on_disk,
    place_of,
    working_dtype,
)

MANY = 2**22  # numbers


def resident(place) -> int:
    """Bytes of a mapping that are in memory, by the system's count."""
    pattern = rf"^{place.address:x}-.*?^Rss:\s+(\d+) kB"
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    return 1024 * int(re.search(pattern, text, re.MULTILINE | re.DOTALL)[1])


def test_a_shard_is_mapped_and_not_read(tmp_path):
    weight = torch.arange(MANY, dtype=torch.float32).view(1024, -1)  # (O, C)
    save_file({"a": weight, "b": torch.ones(3).bfloat16()}, tmp_path / "x.safetensors")
    tensors = map_shard(tmp_path / "x.safetensors", read_header(tmp_path / "x.safetensors"), torch.float32)
    place = place_of(tensors["a"])
    assert place is place_of(tensors["b"]) and resident(place) < weight.nbytes / 10
    assert torch.equal(tensors["a"], weight) and tensors["b"].dtype == torch.bfloat16
    assert (working_dtype(tensors["b"]), working_dtype(weight)) == (torch.float32, torch.float32)
    assert resident(place) > weight.nbytes / 2
    give_back(tensors["a"])
    assert resident(place) < weight.nbytes / 10 and torch.equal(tensors["a"], weight)


def test_an_odd_header_is_read_all_the_same(tmp_path):
    """Another writer's header may have any length, so that numbers begin at odd bytes."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(5.0)}, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    (tensor,) = map_shard(path, read_header(path), torch.float32).values()
    assert torch.equal(tensor, torch.arange(5.0)) and place_of(tensor) is not None


def test_a_changed_weight_is_kept_exactly():
    """In the dtype it is computed with, or in the stored one where that changes nothing."""
    stored = on_disk(torch.tensor([1.0, 2.0]), torch.float32, torch.bfloat16)
    assert stored.dtype == torch.bfloat16 and working_dtype(stored) == torch.float32
    third = torch.tensor([1 / 3, 1.0], dtype=torch.float64)
    new = in_place_of(stored, third)
    assert place_of(new) and new.dtype == torch.float32 and torch.equal(new, third.float())
    assert in_place_of(stored, stored * 2).dtype == torch.bfloat16
    assert in_place_of(new, stored) is stored  # it has a file already
    held = in_place_of(torch.zeros(2, dtype=torch.bfloat16), third)
    assert place_of(held) is None and held.dtype == torch.bfloat16


def test_writes_to_a_temporary_file_outlive_their_pages():
    tensor = file_tensor((MANY,), torch.float32, "do something")
    tensor.fill_(3.0)
    assert resident(place_of(tensor)) > tensor.nbytes / 2
    give_back_pages()
    assert resident(place_of(tensor)) == 0 and bool((tensor == 3.0).all())


def test_views_and_parameters_share_the_place_and_it_goes_with_them():
    tensor = file_tensor((4, 3), torch.float32, "do something", torch.float32)
    place = place_of(tensor)
    parameter = torch.nn.Parameter(tensor.detach()[1:])
    del tensor
    gc.collect()
    assert place_of(parameter) is place and place_of(parameter.data.T) is place


@pytest.mark.parametrize("load", [load_model, map_model])
def test_numbers_that_are_not_finite_are_found(load, tiny_checkpoint):
    directory = tiny_checkpoint(torch_dtype="bfloat16")
    state = {name: weight.clone() for name, weight in map_model(directory).state_dict().items()}
    name = next(reversed(state))
    state[name].view(-1)[-1] = torch.inf
    save_file(state, directory / "model.safetensors")
    with pytest.raises(UserError, match=f"{re.escape(name)} holds NaN or Inf: the shard is damaged"):
        load(directory)


def test_pickled_weights_are_not_mapped(tiny_checkpoint):
    directory = tiny_checkpoint()
    torch.save(load_model(directory).state_dict(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has only pickled weights"):
        map_model(directory)
