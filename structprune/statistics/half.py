"""Products of half-precision rows summed in fp32, where the device can multiply them as they are.

A product of two bf16 or fp16 numbers is exact in fp32. So a sum of such products equals that of the same rows in fp32,
except for the order of summation, at the speed of the half-precision units.
"""

from collections.abc import Callable
from functools import lru_cache

import torch

HALF = (torch.bfloat16, torch.float16)
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]  # total (A, C) fp32 += left (A, R) right (R, C)


def fused(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """One kernel, where `addmm` accepts an fp32 sum with half-precision factors."""
    torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def apart(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """The product in fp32, then the sum."""
    total += torch.mm(left, right, out_dtype=torch.float32)  # (A, C)


def half_product(device: torch.device, dtype: torch.dtype) -> Product | None:
    """The product with an fp32 sum for rows of a dtype on a device; None where they must become fp32 first.

    Never on CPU, where half-precision products are many times slower than fp32 ones.
    """
    return None if device.type == "cpu" or dtype not in HALF else find_product(device, dtype)


@lru_cache
def find_product(device: torch.device, dtype: torch.dtype) -> Product | None:
    """The first of `fused` and `apart` that gives the right sum in a small case; None where neither does.

    Tried once per device and dtype rather than looked up by version, because builds and devices differ.
    """
    rows = torch.ones(4104, 8, dtype=dtype, device=device)  # (R, C)
    for product in (fused, apart):
        total = torch.full((8, 12), 0.25, device=device)
        try:
            product(total[2:6, 3:11], rows[:, :4].T, rows)  # as Gram tiles are: a view, a transposed view
            right = bool((total[2:6, 3:11] == 4104.25).all())  # no half-precision number
        except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
            continue
        if right and float(total.sum()) == 32 * 4104.25 + 64 * 0.25:
            return product
    return None


def split_terms(rows: torch.Tensor) -> list[torch.Tensor]:
    """fp32 rows as a sum of two bf16 terms, with a relative error of at most 2⁻¹⁷.

    bf16 has 8 significant bits: the first rounding leaves a remainder of at most 2⁻⁸ of the entry's power of two, and
    rounding that remainder leaves 2⁻⁹ of it.

    Args:
        rows: (R, C) fp32, overwritten.
    """
    high = rows.bfloat16()  # (R, C)
    return [high, rows.sub_(high).bfloat16()]
