"""Packed weights by hand: values, bits and offsets of both layouts, and the way back."""

import pytest
import torch

from structprune import UserError
from structprune.checkpoint.bitmask import ANY, PAIRS, in_pairs, pack, packed_bytes, unpack


def equal(parts: dict, expected: dict) -> bool:
    """Names, dtypes, shapes and values."""
    return parts.keys() == expected.keys() and all(
        parts[name].dtype == value.dtype and torch.equal(parts[name], value) for name, value in expected.items()
    )


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_any_number_of_values():
    weight = torch.tensor([[0.0, 5, 0, 0, 1, 0, 0, 0, 0, 2], [3, 0, 0, 0, 0, 0, 0, 7, -0.0, 0]])  # (O, C)
    parts = pack(weight, ANY)
    bits = [[2 + 16, 2], [1 + 128, 0]]  # inputs 1 and 4, 9; 0 and 7
    expected = {
        "shape": torch.tensor([2, 10]),
        "compressed": torch.tensor([5.0, 1, 2, 3, 7]),
        "bitmask": torch.tensor(bits, dtype=torch.uint8),
        "row_offsets": torch.tensor([0, 3]),
    }
    assert equal(parts, expected)
    assert bytes_of(unpack(parts)) == bytes_of(weight.abs())  # +0 where there was -0


def test_two_of_four():
    """Groups that are short of two values get zeros, at the last of their free places."""
    weight = torch.tensor([[0, 5, 0, 1, 0, 0, 2, 0], [-0.0, 0, 0, -0.0, 3, 4, 0, 0]], dtype=torch.bfloat16)  # (O, C)
    parts = pack(weight, PAIRS)
    bits = [[2 + 8 + 64 + 128], [4 + 8 + 16 + 32]]
    expected = {
        "shape": torch.tensor([[2], [8]]),
        "compressed": torch.tensor([[5, 1, 2, 0], [0, 0, 3, 4]], dtype=torch.bfloat16),
        "bitmask": torch.tensor(bits, dtype=torch.uint8),
    }
    assert equal(parts, expected) and bytes_of(parts["compressed"]) == bytes_of(expected["compressed"])
    assert bytes_of(unpack(parts)) == bytes_of(weight.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows, columns", [(1, 4), (3, 12), (5, 20), (16, 8)])
def test_both_ways_at_random(dtype, rows, columns):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)  # (O, C)
    weight[torch.rand(rows, columns, generator=generator) < 0.4] = 0
    weight[0] = 0
    size = weight.element_size()
    parts = pack(weight, ANY)
    assert bytes_of(unpack(parts)) == bytes_of(weight)
    kept = int((weight != 0).sum())
    assert packed_bytes((rows, columns), kept, size, ANY) == sum(part.nbytes for part in parts.values())
    ranks = weight.abs().unflatten(1, (-1, 4)).argsort(-1).argsort(-1).flatten(1)  # (O, C)
    weight[ranks < 2] = 0
    parts = pack(weight, PAIRS)
    assert bytes_of(unpack(parts)) == bytes_of(weight)
    assert packed_bytes((rows, columns), rows * columns // 2, size, PAIRS) == sum(map(nbytes, parts.values()))


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes


def test_columns_that_fill_no_byte():
    weight = torch.tensor([[0.0, 0, 9, 0, 0], [0, 0, 0, 0, 8]])  # (O, C)
    parts = pack(weight, ANY)
    assert parts["bitmask"].tolist() == [[4], [16]] and torch.equal(unpack(parts), weight)


def test_pairs():
    keep = torch.tensor([[True, False, True, False, False, False, True, True]])  # (O, C)
    assert in_pairs(keep) and not in_pairs(keep[:, :6]) and not in_pairs(~torch.zeros(1, 8, dtype=torch.bool))
    assert not in_pairs(torch.tensor([[True, True, True, False, True, False, False, False]]))  # four of eight


def test_what_pairs_rule_out():
    with pytest.raises(UserError, match="^more than two of four neighbouring weights are not zero"):
        pack(torch.tensor([[1.0, 2, 3, 0]]), PAIRS)
    with pytest.raises(UserError, match="^6 inputs cannot be packed as 2:4: give a multiple of 4$"):
        pack(torch.zeros(2, 6), PAIRS)


@pytest.mark.parametrize("part, value", [
    ("row_offsets", torch.tensor([0, 1])),
    ("compressed", torch.tensor([1.0])),
    ("shape", torch.tensor([3, 4])),
    ("bitmask", torch.tensor([[1], [4]], dtype=torch.uint8)),
])  # fmt: skip
def test_parts_that_contradict_each_other(part, value):
    parts = pack(torch.tensor([[1.0, 2, 0, 0], [0, 0, 3, 0]]), ANY)
    assert unpack(parts).tolist() == [[1, 2, 0, 0], [0, 0, 3, 0]]
    with pytest.raises(ValueError, match="contradict each other"):
        unpack(parts | {part: value})


def test_pairs_that_are_none():
    parts = pack(torch.tensor([[1.0, 2, 0, 0, 3, 0, 4, 0]]), PAIRS)
    with pytest.raises(ValueError, match="contradict each other"):
        unpack(parts | {"bitmask": torch.tensor([[7 + 16]], dtype=torch.uint8)})  # three of the first four, one after
