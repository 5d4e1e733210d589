"""SparseGPT against the released implementation and a slow reference that moves one column at a time in fp64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from structprune.masking.scores import sparsegpt as module
from structprune.masking.scores.sparsegpt import factorise, invert_lower, sparsegpt

LAYER = Path(__file__).parents[2] / "parity" / "sparsegpt-layer"
CASES = json.loads((LAYER / "cases.json").read_text())


def make(outputs: int, columns: int, seed: int = 0, tokens: int | None = None):
    """Correlated inputs (R, C) of unlike sizes and weights (O, C)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens or 4 * columns, columns, generator=generator) @ mixing
    return x * (0.2 + torch.rand(columns, generator=generator)), torch.randn(outputs, columns, generator=generator)


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper U with (G + λI)⁻¹ = UᵀU, by the inverse itself: (C, C) fp64."""
    gram = gram.double()
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram)).double()
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


def slow(weight, gram, ratio=0.5, nm=None, column_block=128, damping=0.01):
    """One column at a time, its error spread over all columns right of it at once: weights and mask (O, C)."""
    current, upper = weight.double().clone(), inverse_factor(gram, damping)
    keep = torch.ones(current.shape, dtype=torch.bool)
    for column in range(current.shape[1]):
        if nm is None and column % column_block == 0:
            stop = min(column + column_block, current.shape[1])
            score = current[:, column:stop] ** 2 / upper.diagonal()[column:stop] ** 2
            keep[:, column:stop] = score > score.flatten().sort().values[int(score.numel() * ratio)]
        if nm is not None and column % nm[1] == 0:
            stop = column + nm[1]
            score = current[:, column:stop] ** 2 / upper.diagonal()[column:stop] ** 2
            for row in range(len(current)):
                keep[row, column + score[row].argsort()[: nm[0]]] = False
        error = torch.where(keep[:, column], 0.0, current[:, column]) / upper[column, column]
        current[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
        current[:, column] *= keep[:, column]
    return current, keep


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_equals_the_released_implementation(case, scale):
    tensors = load_file(LAYER / "layer.safetensors")
    inputs = tensors["inputs"].flatten(0, 1)  # (R, C)
    factor = factorise(scale * inputs.T @ inputs, CASES["damping"])
    nm = tuple(case["nm"]) if case["nm"] else None
    [(weight, keep)] = sparsegpt([tensors["weight"]], factor, case["sparsity"], nm, CASES["column_block"])
    expected = tensors[f"{case['name']}/weight"]
    assert torch.equal(weight != 0, expected != 0)
    assert torch.allclose(weight, expected, atol=1e-5, rtol=1e-4)
    assert (weight == 0).float().mean().item() == pytest.approx(case["zero_fraction"], abs=1e-6)
    assert factor.dead.nonzero().flatten().tolist() == [66] and factor.damping == CASES["damping"]
    assert not weight[~keep].any() and weight[:, 66].eq(0).all()


UNSTRUCTURED = [
    (7, 200, 0.5, 128),  # a block and a rest
    (5, 130, 0.3, 128),  # a rest of two columns
    (9, 33, 0.7, 128),  # one block, INNER and one more
    (6, 10, 0.5, 128),  # less than INNER
    (4, 100, 0.5, 48),  # blocks that INNER does not divide
    (3, 20, 0.4, 1),  # every column chooses alone
    (1, 64, 0.9, 64),  # one row
]


@pytest.mark.parametrize("outputs, columns, ratio, column_block", UNSTRUCTURED)
def test_equals_one_column_at_a_time(outputs, columns, ratio, column_block):
    x, weight = make(outputs, columns)
    gram = x.T @ x
    [(updated, keep)] = sparsegpt([weight], factorise(gram), ratio, column_block=column_block)
    expected, mask = slow(weight, gram, ratio, column_block=column_block)
    assert torch.equal(keep, mask)
    assert torch.allclose(updated.double(), expected, atol=1e-4)
    assert updated.dtype == torch.float32 and keep.dtype == torch.bool
    for start in range(0, columns, column_block):
        part = keep[:, start : start + column_block]
        assert (~part).sum() == int(part.numel() * ratio) + 1


GROUPED = [
    (7, 198, (3, 6), 128),
    (5, 135, (2, 5), 128),
    (6, 129, (1, 3), 128),
    (8, 200, (2, 4), 128),
    (4, 100, (2, 4), 50),  # a block is cut at 48
    (4, 60, (7, 20), 128),
    (3, 96, (20, 48), 32),  # a group is wider than block and INNER
    (5, 24, (3, 6), 4),
]


@pytest.mark.parametrize("outputs, columns, nm, column_block", GROUPED)
def test_groups_equal_one_column_at_a_time(outputs, columns, nm, column_block, valid_groups):
    x, weight = make(outputs, columns, seed=1)
    gram = x.T @ x
    [(updated, keep)] = sparsegpt([weight], factorise(gram), nm=nm, column_block=column_block)
    expected, mask = slow(weight, gram, nm=nm)
    assert torch.equal(keep, mask)
    assert torch.allclose(updated.double(), expected, atol=1e-4)
    assert valid_groups(keep, *nm) and (~keep).sum() == outputs * columns * nm[0] / nm[1]


@pytest.mark.parametrize("nm", [None, (2, 4), (3, 6)])
def test_matrices_that_share_a_factor_equal_one_at_a_time(nm):
    x, weight = make(24, 150 if nm is None else 156)
    weight[:5] *= 10  # a threshold over all rows together would take these last
    factor = factorise(x.T @ x)
    parts = list(weight.split((5, 12, 7)))
    together = sparsegpt(parts, factor, 0.5, nm)
    for part, (updated, keep) in zip(parts, together, strict=True):
        [(alone, mask)] = sparsegpt([part], factor, 0.5, nm)
        assert torch.equal(keep, mask) and torch.allclose(updated, alone, atol=1e-5)
        assert updated.is_contiguous() and keep.is_contiguous() and updated.shape == part.shape


@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_what_stays_takes_over(nm):
    x, weight = make(16, 160)
    before = weight.clone()
    [(updated, keep)] = sparsegpt([weight], factorise(x.T @ x), 0.5, nm)
    error = ((updated - weight) @ x.T).pow(2).sum()
    plain = ((weight * keep - weight) @ x.T).pow(2).sum()
    assert error < 0.75 * plain
    assert torch.equal(weight, before)


def test_uncorrelated_inputs_leave_the_rest_alone():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0]])
    [(updated, keep)] = sparsegpt([weight], factorise(torch.diag(torch.tensor([9.0, 1.0, 4.0, 1.0]))), nm=(2, 4))
    assert keep.tolist() == [[False, True, True, False]]  # |w| · norm is 3, 4, 4, 3 (nearly: damping)
    assert torch.allclose(updated, torch.tensor([[0.0, -4.0, 2.0, 0.0]]))


def test_factor_is_the_upper_root_of_the_inverse():
    x, _ = make(1, 40)
    gram = x.T @ x
    before = gram.clone()
    factor = factorise(gram, 0.05)
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    assert torch.allclose(upper, inverse_factor(gram, 0.05), rtol=1e-3, atol=1e-6)
    damped = gram.double() + 0.05 * gram.diagonal().double().mean() * torch.eye(40)
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(40).double(), atol=1e-4)
    assert factor.damping == 0.05 and not factor.dead.any()
    assert torch.equal(gram, before)


def test_damping_nought_is_none():
    factor = factorise(torch.diag(torch.tensor([4.0, 16.0])), 0.0)
    assert torch.equal(factor.upper, torch.diag(torch.tensor([0.5, 0.25]))) and factor.damping == 0


@pytest.mark.parametrize("damping", [0.0, 1e-9])
def test_damping_grows_until_too_few_tokens_can_be_factored(damping, valid_groups):
    x, weight = make(6, 64, tokens=5)
    gram = x.T @ x
    factor = factorise(gram, damping)
    assert factor.damping >= 1e-4
    root = torch.linalg.inv(factor.upper.double())  # so G + λI = root rootᵀ, with the λ it reports
    damped = gram.double() + factor.damping * gram.diagonal().double().mean() * torch.eye(64)
    assert torch.allclose(root @ root.T, damped, atol=1e-5)
    [(updated, keep)] = sparsegpt([weight], factor, nm=(2, 4))
    assert torch.isfinite(updated).all() and valid_groups(keep, 2, 4)


def test_damping_grows_tenfold(monkeypatch):
    means, real = [], torch.linalg.cholesky_ex

    def fail_twice(matrix):
        means.append(matrix.diagonal().mean().item())
        lower, failed = real(matrix)
        return lower, failed if len(means) > 3 else torch.tensor(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail_twice)
    assert factorise(torch.eye(4), 0.0).damping == pytest.approx(1e-2)
    assert means == pytest.approx([1, 1 + 1e-4, 1 + 1e-3, 1 + 1e-2])
    means.clear()
    assert factorise(torch.eye(4), 0.01).damping == pytest.approx(10)


def test_dead_inputs_lose_their_weights_and_move_nothing_else():
    x, weight = make(8, 12)
    x[:, [3, 7, 8]] = 0
    alive = [0, 1, 2, 4, 5, 6, 9, 10, 11]
    gram = x.T @ x
    factor = factorise(gram)
    assert factor.dead.nonzero().flatten().tolist() == [3, 7, 8]
    [(updated, keep)] = sparsegpt([weight], factor, 0.5)
    assert updated[:, [3, 7, 8]].eq(0).all() and not keep[:, [3, 7, 8]].any()
    # of 96 entries int(48) + 1 go: the 24 dead ones, and int(24.5) + 1 of the 72 others
    expected, mask = slow(weight[:, alive], gram[alive][:, alive], 24.5 / 72, damping=0.01 * 9 / 12)
    assert torch.equal(keep[:, alive], mask) and (~keep).sum() == 49
    assert torch.allclose(updated[:, alive].double(), expected, atol=1e-5)
    small = factorise(gram * 1e-12)  # the 1 of a dead input has no say in the damping, whatever the units
    assert torch.allclose(small.upper[alive][:, alive] * 1e-6, factor.upper[alive][:, alive], rtol=1e-4, atol=1e-7)


def test_nothing_but_dead_inputs(valid_groups):
    factor = factorise(torch.zeros(8, 8))
    assert factor.dead.all()
    [(updated, keep)] = sparsegpt([torch.ones(2, 8)], factor, nm=(2, 4))
    assert updated.eq(0).all() and valid_groups(keep, 2, 4)


def test_large_grams_can_be_factored(monkeypatch):
    calls, real = [], torch.linalg.cholesky_ex

    def counted(matrix):
        calls.append(1)
        assert len(calls) < 50, "damping grows without end"
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    factor = factorise(torch.eye(300) * 1e37)  # whose diagonal sums to more than fp32 holds
    assert factor.damping == 0.01 and torch.allclose(factor.upper.diagonal(), torch.tensor(1.01e37**-0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    gram = torch.eye(4)
    gram[1, 2] = value
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        factorise(gram)


def test_damping_that_overflows_ends():
    with pytest.raises(torch.linalg.LinAlgError, match="cannot be factored"):
        factorise(torch.eye(4) * torch.finfo(torch.float32).max)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 16])
def test_a_triangular_matrix_is_inverted_half_by_half(monkeypatch, size):
    monkeypatch.setattr(module, "SOLVED", 3)
    generator = torch.Generator().manual_seed(size)
    lower = torch.randn(size, size, generator=generator).tril(-1) + torch.diag(torch.arange(1.0, size + 1))  # (C, C)
    inverse = torch.zeros_like(lower)
    invert_lower(lower, inverse)
    assert torch.allclose(inverse @ lower, torch.eye(size), atol=1e-5) and torch.equal(inverse, inverse.tril())


def test_the_inverse_of_a_triangular_matrix_by_hand(monkeypatch):
    monkeypatch.setattr(module, "SOLVED", 1)
    lower, inverse = torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.zeros(2, 2)
    invert_lower(lower, inverse)
    assert inverse.tolist() == [[0.5, 0.0], [-0.375, 0.25]]
