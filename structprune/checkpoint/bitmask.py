"""Weights with zeros as their nonzero values and one bit per weight: two layouts that compressed-tensors unpacks.

    sparse-24-bitmask   two values of every four neighbouring inputs
    sparse-bitmask      any number of values

Shapes: O outputs, C inputs, N values of a weight.
"""

import torch

from structprune.errors import UserError
from structprune.masking.masks import pack_bits, unpack_bits
from structprune.masking.patterns import group_mask

PAIRS, ANY = "sparse-24-bitmask", "sparse-bitmask"
PARTS = ("shape", "compressed", "bitmask", "row_offsets")
STRUCTURES = {PAIRS: "2:4", ANY: "unstructured"}  # layout -> compressed-tensors' name for its zeros


def in_pairs(keep: torch.Tensor) -> bool:
    """Whether exactly two of every four neighbouring inputs are kept: (O, C) bool."""
    if keep.shape[1] % 4:
        return False
    return bool((keep.unflatten(1, (-1, 4)).sum(-1) == 2).all())


def pack(weight: torch.Tensor, layout: str) -> dict[str, torch.Tensor]:
    """The parts of a weight (O, C), by the end of their names; -0 becomes +0.

    Args:
        layout: one of `STRUCTURES`.
    Returns:
        `shape`, O and C: (2,), of pairs (2, 1). `compressed`, the values row by row: (N,), of pairs (O, C / 2), where
        zeros fill up what is short of two. `bitmask`, as `pack_bits`: (O, ceil(C / 8)). `row_offsets`, how many values
        go before each row: (O,), absent of pairs.
    Raises:
        UserError: pairs of a weight that has three nonzero values of four, or whose inputs are no multiple of four.
    """
    rows, columns = weight.shape
    weight = weight.masked_fill(weight == 0, 0)  # (O, C)
    keep = weight != 0  # (O, C)
    if layout == PAIRS:
        keep = _pairs(keep)
        values = weight[keep].view(rows, columns // 2)  # (O, C / 2)
        return {"shape": torch.tensor([[rows], [columns]]), "compressed": values, "bitmask": pack_bits(keep)}
    return {
        "shape": torch.tensor([rows, columns]),
        "compressed": weight[keep],
        "bitmask": pack_bits(keep),
        "row_offsets": _offsets(keep),
    }


def _pairs(nonzero: torch.Tensor) -> torch.Tensor:
    """What is stored of every four neighbouring inputs: the nonzero ones, and zeros up to two: (O, C) bool."""
    if nonzero.shape[1] % 4:
        raise UserError(f"{nonzero.shape[1]} inputs cannot be packed as 2:4: give a multiple of 4")
    keep = group_mask(nonzero.to(torch.int8), 2, 4)  # (O, C) bool
    if bool((nonzero & ~keep).any()):
        raise UserError("more than two of four neighbouring weights are not zero, which 2:4 rules out: mask them first")
    return keep


def _offsets(keep: torch.Tensor) -> torch.Tensor:
    """How many are kept in the rows before each one: (O, C) bool -> (O,)."""
    counts = keep.sum(1)  # (O,)
    return counts.cumsum(0) - counts


def unpack(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The inverse of `pack`: the weight (O, C).

    Raises:
        ValueError: parts that contradict each other.
    """
    (rows, columns), values = parts["shape"].flatten().tolist(), parts["compressed"]
    keep = unpack_bits(parts["bitmask"], columns)  # (O, C)
    offsets = parts.get("row_offsets")
    fits = in_pairs(keep) if offsets is None else torch.equal(offsets, _offsets(keep))
    if not fits or keep.shape != (rows, columns) or int(keep.sum()) != values.numel():
        raise ValueError(f"the parts of a packed weight of {rows} x {columns} contradict each other")
    weight = torch.zeros(rows, columns, dtype=values.dtype)  # (O, C)
    weight[keep] = values.flatten()
    return weight


def packed_bytes(shape: tuple[int, int], kept: int, itemsize: int, layout: str) -> int:
    """Bytes of the parts of a weight (O, C) of which `kept` values are stored, each of `itemsize`."""
    rows, columns = shape
    return 16 + kept * itemsize + rows * -(-columns // 8) + (8 * rows if layout == ANY else 0)
