"""The file of hashes of learnt text."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from structprune.checkpoint.learnt_text import LEARNT, read_learnt, write_learnt
from structprune.errors import UserError

LARGE = np.uint64(2**64 - 1)  # beyond int64


def test_hashes_come_back_with_those_of_the_input(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    assert len(read_learnt(first)) == 0
    write_learnt(first / LEARNT, np.array([3, LARGE], np.uint64), tmp_path)
    write_learnt(second / LEARNT, np.array([3, 5], np.uint64), first)
    assert read_learnt(first).tolist() == [3, 2**64 - 1] and read_learnt(second).tolist() == [3, 5, 2**64 - 1]


@pytest.mark.parametrize("tensors", [{"other": torch.zeros(2)}, {"runs": torch.zeros(2)}, None])
def test_a_damaged_file_is_one_line(tmp_path, tensors):
    (tmp_path / LEARNT).write_bytes(b"half") if tensors is None else save_file(tensors, tmp_path / LEARNT)
    with pytest.raises(UserError, match="put the file back, or delete it"):
        read_learnt(tmp_path)
