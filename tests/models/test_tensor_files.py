"""Safetensors files of our own: the same bytes for the same content, and never half of one."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from structprune.errors import UserError
from structprune.models.tensor_files import NAMES, write_streamed, write_tensors

METADATA = {f"key {number}": f"value {number}" for number in range(20)}  # 20! orders
TENSORS = {"b": torch.arange(6).view(2, 3), "a": torch.tensor([[0.5]]), "empty": torch.zeros(0, 4)}


def metadata_of(path) -> dict:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_equal_content_gives_equal_bytes(tmp_path):
    backwards = dict(reversed(METADATA.items()))
    for name, metadata in (("one", METADATA), ("two", METADATA), ("three", backwards)):
        write_tensors(tmp_path / name, TENSORS, metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "three").read_bytes()
    header = (tmp_path / "one").read_bytes()
    places = [header.index(f'"{key}"'.encode()) for key in sorted(METADATA)]
    assert places == sorted(places)
    assert metadata_of(tmp_path / "one") == METADATA
    result = load_file(tmp_path / "one")
    assert result.keys() == TENSORS.keys() and all(torch.equal(result[name], TENSORS[name]) for name in TENSORS)


def test_any_text_can_be_in_the_metadata(tmp_path):
    """What JSON escapes takes the room that safetensors gave it."""
    odd = {"".join(map(chr, range(0x250))): '"\\/\u2028\ud7ff\U0001f600', "": "", "z": "\n\t\x7f"}
    write_tensors(tmp_path / "odd", TENSORS, odd)
    assert metadata_of(tmp_path / "odd") == odd
    assert torch.equal(load_file(tmp_path / "odd")["b"], TENSORS["b"])
    write_tensors(tmp_path / "none", {}, {"a": "b"})
    assert metadata_of(tmp_path / "none") == {"a": "b"} and load_file(tmp_path / "none") == {}


def test_views_and_shared_memory(tmp_path):
    whole = torch.arange(12).view(3, 4)
    write_tensors(tmp_path / "views", {"all": whole, "turned": whole.T, "part": whole[1:, ::2]}, {})
    result = load_file(tmp_path / "views")
    assert torch.equal(result["turned"], whole.T) and result["part"].tolist() == [[4, 6], [8, 10]]


@pytest.mark.parametrize("step", ["save_file", "raw_header"])
def test_a_failure_leaves_what_was_there(step, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*arguments, **named):
        raise OSError("No space left on device\nand more")

    monkeypatch.setattr(f"structprune.models.tensor_files.{step}", fail)
    with pytest.raises(UserError, match=r"file cannot be written \(No space left on device\)$"):
        write_tensors(path, TENSORS, METADATA)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_written_tensor_by_tensor_is_the_librarys(tmp_path):
    """Byte for byte, with every dtype, names that need an escape, and equal dtypes in the order of names."""
    tensors = {f'{name} ä"x': torch.arange(6).view(2, 3).to(getattr(torch, name)) for name in NAMES}
    tensors |= {"b": torch.randn(4, 3).bfloat16(), "a": torch.ones(3).bfloat16(), "one": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    reads = []

    def read(name):
        reads.append(name)
        return tensors[name]

    headers = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    write_streamed(tmp_path / "ours.safetensors", headers, read, {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert sorted(reads) == sorted(tensors)
