"""Moments, their merging, Gram products, norms and relative row weights, by hand and against plain sums."""

import pytest
import torch

from structprune.statistics import activations
from structprune.statistics.activations import (
    add_gram,
    add_products,
    add_rows,
    empty_sum,
    merge_moments,
    mirror,
    moments,
    relative_weight,
    squared_norms,
)


def test_moments_by_hand():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [8.0, 5.0]])
    result = moments(x)
    assert result.weight.item() == 3
    assert result.mean.tolist() == pytest.approx([4, 5 / 3])
    assert result.spread.tolist() == pytest.approx([9 + 1 + 16, 2 * 25 / 9 + 100 / 9])
    assert result.variance.tolist() == pytest.approx([26 / 3, 50 / 9])
    assert result.squared_norm.tolist() == pytest.approx([1 + 9 + 64, 25])


def test_moments_weigh_rows_by_the_square_of_omega():
    x = torch.tensor([[1.0], [3.0], [100.0]])
    result = moments(x, torch.tensor([2.0, 1.0, 0.0]))  # squares 4, 1, 0
    assert result.weight.item() == 5
    assert result.mean.item() == pytest.approx(7 / 5)
    assert result.spread.item() == pytest.approx(4 * 0.4**2 + 1.6**2)
    assert result.squared_norm.item() == pytest.approx(4 * 1 + 9)


def test_variance_survives_a_large_mean():
    x = torch.tensor([[10001.0], [10003.0]]).repeat(500, 1)
    assert moments(x).variance.item() == pytest.approx(1.0, rel=1e-6)


def test_no_weight_at_all_is_no_nan():
    empty = moments(torch.ones(4, 2), torch.zeros(4))
    assert empty.weight == 0 and empty.squared_norm.tolist() == [0, 0]
    merged = merge_moments(empty, moments(torch.tensor([[1.0, 2.0], [3.0, 2.0]])))
    assert merged.mean.tolist() == [2, 2] and merged.spread.tolist() == [2, 0]
    assert merge_moments(empty, empty).mean.tolist() == [0, 0]


def test_merging_parts_equals_all_rows_at_once():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 6, 5, generator=generator) + 3, torch.rand(4, 6, generator=generator)
    whole = moments(x, weight)
    merged = moments(x[:1], weight[:1])
    for part in (slice(1, 3), slice(3, 4)):
        merged = merge_moments(merged, moments(x[part], weight[part]))
    for name in ("weight", "mean", "spread", "squared_norm"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), rtol=1e-6), name
    rows, squares = x.flatten(0, 1).double(), weight.flatten().double() ** 2
    assert torch.allclose(whole.squared_norm, squares @ rows**2, rtol=1e-6)
    assert torch.allclose(whole.mean, squares @ rows / squares.sum(), rtol=1e-6)


def test_products_by_hand():
    left, right = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0], [6.0]])
    total = torch.ones(2, 1)
    assert add_products(total, left, right) is total
    assert total.tolist() == [[1 + 5 + 18], [1 + 10 + 24]]
    weighted = add_products(torch.zeros(2, 1), left, right, torch.tensor([0.5, 2.0]))  # squares 1/4, 4
    assert weighted.tolist() == [[0.25 * 5 + 4 * 18], [0.25 * 10 + 4 * 24]]


def test_weighted_rows_by_hand():
    x, weight = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[0.5, 2.0]])  # squares 1/4, 4
    total = torch.ones(2, 1, dtype=torch.float64)
    assert add_rows(total, x, weight) is total
    assert total.tolist() == [[1 + 0.25 + 12], [1 + 0.5 + 16]]


def test_the_sum_of_rows_does_not_round_where_it_is_large():
    total, one = torch.full((1, 1), 2.0**24, dtype=torch.float64), torch.ones(1)
    for _ in range(3):  # an fp32 sum would stay where it is
        add_rows(total, one[None], one)
    assert total.item() == 2**24 + 3


def test_products_leave_their_inputs_alone():
    x, weight = torch.ones(3, 2), torch.full((3,), 2.0)
    assert add_products(torch.zeros(2, 2), x, x, weight).tolist() == [[12, 12], [12, 12]]
    assert x.eq(1).all() and weight.eq(2).all()


def test_relative_weight_divides_by_the_rms_of_the_stream():
    states = torch.tensor([[[3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]])  # RMS 2.5 and 1
    assert torch.allclose(relative_weight(states, None), torch.tensor([[0.4, 1.0]]))
    assert torch.allclose(relative_weight(states, torch.tensor([[0.5, 0.5]])), torch.tensor([[0.2, 0.5]]))


def test_relative_weight_of_a_stream_of_zeros_is_finite():
    states = torch.tensor([[0.0, 0.0], [1e-6, 1e-6], [1e-4, 1e-4]])
    assert relative_weight(states, None).tolist() == pytest.approx([1e5, 1e5, 1e4])


@pytest.mark.parametrize("size, tile", [(8, (3, 9)), (8, (3, 2)), (8, (8, 8)), (7, (384, 4096)), (9, (1, 4))])
def test_gram_in_tiles_equals_all_products(monkeypatch, size, tile):
    monkeypatch.setitem(activations.PRODUCT_TILE, "cpu", tile)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, size, generator=generator), torch.rand(2, 5, generator=generator)
    total = torch.zeros(size, size)
    assert add_gram(total, x) is total
    add_gram(total, x[:1], weight[:1])
    rows, weighted = x.flatten(0, 1), x[0] * weight[0, :, None]
    expected = rows.T @ rows + weighted.T @ weighted
    assert torch.allclose(total.triu(), expected.triu(), atol=1e-5)
    if tile[0] < size:
        assert total[-1, 0] == 0  # half the work
    assert mirror(total) is total and torch.allclose(total, expected, atol=1e-5) and torch.equal(total, total.T)


@pytest.mark.parametrize("tile", [(2, 3), (384, 4096)])
def test_products_in_tiles_equal_all(monkeypatch, tile):
    monkeypatch.setitem(activations.PRODUCT_TILE, "cpu", tile)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 6, 5, generator=generator), torch.randn(2, 6, 7, generator=generator)
    total = add_products(empty_sum(5, 7, torch.device("cpu")), left, right)
    assert torch.allclose(total, (left.flatten(0, 1).T @ right.flatten(0, 1)).double(), atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_do_not_depend_on_which_sequences_share_a_pass(weighted):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 40, 6, generator=generator) + 2
    y = torch.randn(7, 40, 5, generator=generator)
    weight = torch.rand(7, 40, generator=generator) if weighted else None

    def added(parts, x=x, y=y):
        """The fp32 Gram matrix and products, summed part by part in totals of their own, as processes do."""
        gram, cross = empty_sum(6, 6, x.device), empty_sum(5, 6, x.device)
        for part in parts:
            omega = None if weight is None else weight.flatten()[part] if x.dim() == 2 else weight[part]
            gram += add_gram(empty_sum(6, 6, x.device), x[part], omega)
            cross += add_products(empty_sum(5, 6, x.device), y[part], x[part], omega)
        return mirror(gram).float(), cross.float()

    whole = added([slice(7)])
    for parts in ([slice(3), slice(3, 7)], [slice(2), slice(2, 4), slice(4, 7)]):
        assert all(torch.equal(*pair) for pair in zip(whole, added(parts)))
    rows = added([slice(280)], x.flatten(0, 1), y.flatten(0, 1))  # one fp32 sum over all rounds otherwise
    assert not any(torch.equal(*pair) for pair in zip(whole, rows))


def test_gram_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert mirror(add_gram(torch.zeros(2, 2), x)).tolist() == [[10, 14], [14, 20]]
    weighted = add_gram(torch.ones(2, 2), x, torch.tensor([0.5, 2.0]))  # squares 1/4, 4
    assert mirror(weighted).tolist() == [[1 + 0.25 + 36, 1 + 0.5 + 48], [1 + 0.5 + 48, 1 + 1 + 64]]
    assert x.tolist() == [[1, 2], [3, 4]]


def test_mirror_takes_what_is_above_the_diagonal():
    assert mirror(torch.tensor([[1.0, 2.0, 3.0], [9.0, 4.0, 5.0], [9.0, 9.0, 6.0]])).tolist() == [
        [1, 2, 3],
        [2, 4, 5],
        [3, 5, 6],
    ]


def test_gram_of_low_precision_rows_is_not_summed_in_it():
    x = torch.full((4096, 2), 0.1).bfloat16()
    total = mirror(add_gram(empty_sum(2, 2, x.device), x))
    expected = torch.full((2, 2), 4096 * x[0, 0].item() ** 2)  # bf16 would stop growing on the way
    assert total.dtype == torch.float64 and torch.allclose(total.float(), expected, rtol=1e-3)


def test_squared_norms_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 4.0], [5.0, 6.0]]])  # (2, 2, 2)
    assert squared_norms(x).tolist() == [[10, 4], [25, 52]]
    weight = torch.tensor([[1.0, 2.0], [0.5, 0.0]])
    assert squared_norms(x, weight).tolist() == [[1 + 36, 4], [0, 4]]
    assert squared_norms(x.bfloat16(), weight).dtype == torch.float32
    assert x.sum() == 21 and weight.sum() == 3.5
