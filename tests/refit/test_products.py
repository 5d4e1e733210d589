"""Sums for a refit: what they are, and that a batch makes no device wait for the host."""

import pytest
import torch
from torch import nn

from structprune.errors import UserError
from structprune.refit.products import UNCHANGED, LayerFit, Products, RowSums


def linears(device: str = "cpu") -> dict[str, nn.Linear]:
    modules = {role: nn.Linear(3, 2, device=device) for role in ("gate", "up")}
    for linear in modules.values():
        linear.requires_grad_(False)
    return modules


@pytest.mark.parametrize("cross", [True, False])
def test_power_is_that_of_the_output_over_all_batches(cross):
    generator = torch.Generator().manual_seed(0)
    pruned, dense = torch.randn(2, 3, 2, 4, 3, generator=generator).unbind()  # (batches, b, T, C) each
    omega, modules = torch.rand(3, 2, 4, generator=generator), linears()
    sums = RowSums(modules, torch.device("cpu"), cross, power=True)
    for x, y, weight in zip(pruned, dense, omega):
        sums.add(x, y if cross else None, weight)
    products, source = sums.finish(), dense if cross else pruned
    for role, linear in modules.items():
        output = source.double() @ linear.weight.double().T * omega[..., None]  # no bias
        assert type(products.power[role]) is float
        assert products.power[role] == pytest.approx(output.pow(2).sum().item(), rel=1e-6)
    assert RowSums(modules, torch.device("cpu"), cross, power=False).finish().power == {}


def test_the_host_reads_nothing_in_a_batch():
    """On the meta device whatever looks at a number raises."""
    sums = RowSums(linears("meta"), torch.device("meta"), cross=True, power=True)
    x = torch.empty(2, 4, 3, device="meta")  # (b, T, C)
    sums.add(x, x, torch.ones(2, 4, device="meta"))


@pytest.mark.parametrize("power, value", [(float("inf"), 1.0), (1.0, float("nan"))])
def test_products_that_overflow_are_named(power, value):
    weight = torch.ones(1, 2, dtype=torch.float64)  # (O, K)
    check = Products(torch.eye(2) * value, torch.ones(1, 2, dtype=torch.float64), power)
    message = "^block 2, MLP channels: the sums of its refit overflow: .*model.dtype = float32 .*reconstruct.enabled"
    with pytest.raises(UserError, match=message):
        LayerFit.of(2, "channels", weight, check, (weight, UNCHANGED, 0.0))


def test_a_layer_without_output_has_the_error_of_no_refit():
    weight = torch.zeros(1, 2, dtype=torch.float64)  # (O, K)
    fit = LayerFit.of(0, "down", weight, Products(torch.eye(2), weight, 0.0), (weight, UNCHANGED, 0.0))
    assert (fit.error, fit.plain()["damping"]) == (1.0, None)
