"""Sums for a refit: what they are, and that a batch makes no device wait for the host."""

import pytest
import torch
from torch import nn

from structprune.refit.products import RowSums


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
