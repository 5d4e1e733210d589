"""Gram products of half-precision rows: exact without weights, split in two terms with them, and found by trying."""

import pytest
import torch

from structprune.statistics import activations, half
from structprune.statistics.activations import add_gram, add_products, mirror
from structprune.statistics.half import find_product, half_product, split_terms

ROWS, UNIT = 64, 2.0**-24  # of fp32's rounding


def emulated(calls: list):
    """What a GPU does: factors as they are, products and sums in fp32."""

    def product(total, left, right):
        assert left.dtype == right.dtype and left.dtype in half.HALF and total.dtype == torch.float32
        calls.append(left.dtype)
        total += left.float() @ right.float()

    return product


@pytest.fixture
def calls(monkeypatch) -> list:
    """The dtypes of the half-precision products that were made, as on an accelerator."""
    calls = []
    monkeypatch.setattr(activations, "BY_SEQUENCE", set())
    product = lambda device, dtype: emulated(calls) if dtype in half.HALF else None  # noqa: E731
    monkeypatch.setattr(activations, "half_product", product)
    return calls


def rows(width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(4, ROWS // 4, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


WEIGHT = torch.rand(4, ROWS // 4, generator=torch.Generator().manual_seed(9)) * 30  # 1 / RMS is not below 1


def bound(left, right, weight, lost: float) -> torch.Tensor:
    """Of |error|, (A, C): an entry loses `lost`, ω² and its product 3 units, the sum over R rows R units."""
    squares = torch.ones(ROWS).double() if weight is None else weight.flatten().double() ** 2  # (R,)
    size = (left.flatten(0, 1).double().abs() * squares[:, None]).T @ right.flatten(0, 1).double().abs()  # (A, C)
    return size * (lost + (ROWS + 3) * UNIT)


def exact(left, right, weight) -> torch.Tensor:
    squares = torch.ones(ROWS).double() if weight is None else weight.flatten().double() ** 2  # (R,)
    return (left.flatten(0, 1).double() * squares[:, None]).T @ right.flatten(0, 1).double()


@pytest.mark.parametrize("dtype", half.HALF)
def test_rows_without_weights_lose_nothing_but_the_order_of_the_sum(dtype, calls):
    left, right = rows(5, dtype), rows(3, dtype, seed=1)
    total = add_products(torch.zeros(5, 3), left, right)
    assert calls == [dtype] and total.dtype == torch.float32  # one for the four sequences
    assert bool(((total - exact(left, right, None)).abs() <= bound(left, right, None, 0.0)).all())
    gram = mirror(add_gram(torch.zeros(5, 5), left))
    assert bool(((gram - exact(left, left, None)).abs() <= bound(left, left, None, 0.0)).all())


def test_weighted_bf16_rows_lose_less_than_two_to_the_minus_17(calls, monkeypatch):
    monkeypatch.setitem(activations.PRODUCT_TILE, "cpu", (4, 9))
    left, right = rows(5, torch.bfloat16), rows(3, torch.bfloat16, seed=1)
    total = add_products(torch.zeros(5, 3), left, right, WEIGHT)
    assert calls == [torch.bfloat16] * 2 * 2  # tiles, terms
    allowed = bound(left, right, WEIGHT, 2.0**-17)
    assert bool(((total - exact(left, right, WEIGHT)).abs() <= allowed).all())
    rounded = (left * WEIGHT[..., None] ** 2).bfloat16()  # in one term it would not do
    assert bool(((exact(rounded, right, None) - exact(left, right, WEIGHT)).abs() > 4 * allowed).any())
    gram = mirror(add_gram(torch.zeros(5, 5), left, WEIGHT))
    assert bool(((gram - exact(left, left, WEIGHT)).abs() <= bound(left, left, WEIGHT, 2.0**-17)).all())
    assert torch.equal(gram, gram.T) and calls[4:] == [torch.bfloat16] * 2 * 2


def test_products_by_hand(calls):
    left, right = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).bfloat16(), torch.tensor([[5.0], [6.0]]).bfloat16()
    weight = torch.tensor([0.5, 2.0])  # squares 1/4, 4
    assert add_products(torch.ones(2, 1), left, right, weight).tolist() == [[1 + 1.25 + 72], [1 + 2.5 + 96]]
    assert mirror(add_gram(torch.ones(2, 2), left, weight)).tolist() == [[37.25, 49.5], [49.5, 66]]
    assert left.tolist() == [[1, 2], [3, 4]] and weight.tolist() == [0.5, 2]


@pytest.mark.parametrize("side", ["both", "left"])
def test_what_half_precision_cannot_hold_becomes_fp32(side, calls):
    left = rows(5, torch.float16) * 500
    right = left if side == "both" else rows(3, torch.float32)
    weight = WEIGHT if side == "both" else None  # fp16 has no room for ω² x; unlike dtypes have no product
    total = add_products(torch.zeros(5, right.shape[-1]), left, right, weight)
    assert calls == [] and bool(total.isfinite().all())
    assert bool(((total - exact(left, right, weight)).abs() <= bound(left, right, weight, 0.0)).all())


def test_two_terms_by_hand():
    x = torch.tensor([[1 + 2**-8 + 2**-15, -3.0, 0.0, 2.0**-100 * 1.001]])
    high, low = split_terms(x.clone())
    assert high.tolist()[0][:3] == [1 + 2**-7, -3, 0] and low.tolist()[0][:3] == [2**-15 - 2**-8, 0, 0]
    lost = (high.double() + low.double() - x.double()).abs()
    assert bool((lost <= x.double().abs() * 2**-17).all()) and high.dtype == low.dtype == torch.bfloat16


def test_a_cpu_and_fp32_rows_are_not_even_tried(monkeypatch):
    monkeypatch.setattr(half, "find_product", lambda device, dtype: half.fused)
    assert half_product(torch.device("cpu"), torch.bfloat16) is None
    assert half_product(torch.device("cuda"), torch.float32) is None
    assert half_product(torch.device("cuda"), torch.bfloat16) is half.fused


def test_a_device_without_such_a_product_is_found_out():
    assert find_product.__wrapped__(torch.device("meta"), torch.bfloat16) is None  # it has shapes, but no numbers


def refuse(total, left, right):
    raise NotImplementedError("no such kernel")


def in_half(total, left, right):
    total += (left @ right).float()


def elsewhere(total, left, right):
    total += left.float() @ right.float()
    total._base[0, 0] = 0.0


@pytest.mark.parametrize("first", [refuse, in_half, elsewhere])
def test_the_first_product_that_is_right_is_found(first, monkeypatch):
    second = lambda total, left, right: total.add_(left.float() @ right.float())  # noqa: E731
    monkeypatch.setattr(half, "fused", first)
    monkeypatch.setattr(half, "apart", second)
    find = find_product.__wrapped__
    assert find(torch.device("cpu"), torch.bfloat16) is second
    monkeypatch.setattr(half, "fused", second)
    assert find(torch.device("cpu"), torch.float16) is second
    monkeypatch.setattr(half, "fused", first)
    monkeypatch.setattr(half, "apart", refuse)
    assert find(torch.device("cpu"), torch.bfloat16) is None


def test_both_forms_ask_for_an_fp32_sum(monkeypatch):
    """As torch takes them where it has them: `addmm` in place, `mm` beside the sum."""

    def addmm(total, left, right, *, out_dtype, out):
        assert out_dtype == torch.float32 and out is total
        return out.copy_(total + left.to(out_dtype) @ right.to(out_dtype))

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch, "mm", lambda left, right, *, out_dtype: left.to(out_dtype) @ right.to(out_dtype))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).bfloat16()
    for product in (half.fused, half.apart):
        total = torch.ones(2, 2)
        product(total, x.T, x)
        assert total.tolist() == [[11, 15], [15, 21]]
