"""Products of half-precision rows summed in fp32, where the device can multiply them as they are.

A product of two bf16 or fp16 numbers is exact in fp32, so a sum over rows of such products is what the same rows in
fp32 would give but for the order of the summation, at the speed of the half-precision units.
"""

from functools import lru_cache
from typing import Callable

import torch

HALF = (torch.bfloat16, torch.float16)
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]  # total (A, C) fp32 += left (A, R) right (R, C)


def fused(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """In one kernel, where `addmm` takes an fp32 sum beside half-precision factors."""
    torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def apart(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """The product in fp32, then the sum."""
    total += torch.mm(left, right, out_dtype=torch.float32)  # (A, C)


def half_product(device: torch.device, dtype: torch.dtype) -> Product | None:
    """What multiplies rows of a dtype on a device with an fp32 sum, or None where they must become fp32 first.

    Never on CPU, where half-precision products are many times slower than fp32 ones, if there are any.
    """
    return None if device.type == "cpu" or dtype not in HALF else find_product(device, dtype)


@lru_cache
def find_product(device: torch.device, dtype: torch.dtype) -> Product | None:
    """The first of `fused` and `apart` that gives the right sum in a small case; None where neither does.

    Tried once per device and dtype, not looked up by version: builds and devices differ in what they have.
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
    """fp32 rows as a sum of two bf16 ones; what is lost of an entry is 2⁻¹⁷ of it at most.

    bf16 has 8 digits and fp32's range: rounding leaves at most 2⁻⁸ of the entry's power of two, and rounding that
    again 2⁻⁹ of it.

    Args:
        rows: (R, C) fp32, overwritten.
    """
    high = rows.bfloat16()  # (R, C)
    return [high, rows.sub_(high).bfloat16()]
