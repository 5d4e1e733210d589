"""What the refit of a block's linears needs of the rows it looks at: sums over them, input by input."""

from dataclasses import dataclass

import torch
from torch import nn

from structprune.refit.reconstruct import Products
from structprune.statistics.activations import add_gram, add_products, mirror


@dataclass(frozen=True)
class InputProducts:
    """Sums over rows of what linears read.

    Attributes:
        gram: (C, C) fp32 X̂ᵀX̂. cross: (C, C) fp32 XᵀX̂; the same tensor where both are one.
        power: role -> ‖W Xᵀ‖², over held-out rows; empty for the others.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    power: dict[str, float]

    def of(self, role: str, weight: torch.Tensor) -> Products:
        """The products of one linear, fp64: its dense weight (O, C) makes the outputs aimed at."""
        wanted = weight.detach().to(self.gram.device).double() @ self.cross.double()  # (O, C)
        return Products(self.gram.double(), wanted, self.power.get(role, float("nan")))


class RowSums:
    """Sums up one purpose's rows; `finish` gives them.

    Args:
        linears: role -> dense linear, all of C inputs.
        cross: whether X is another thing than X̂. power: whether ‖W Xᵀ‖² is asked for.
    """

    def __init__(self, linears: dict[str, nn.Linear], device: torch.device, cross: bool, power: bool):
        size = next(iter(linears.values())).in_features
        self._linears = linears
        self._gram = torch.zeros(size, size, device=device)  # (C, C)
        self._cross = torch.zeros_like(self._gram) if cross else None
        # sums stay on the device until the last batch: to read one would make it wait
        self._power = {role: torch.zeros((), dtype=torch.float64, device=device) for role in linears if power}

    def add(self, hat: torch.Tensor, dense: torch.Tensor | None, omega: torch.Tensor | None) -> None:
        """Count rows X̂ and X (b, T, C), weighted by ω (b, T); None for X̂ again, and for ones."""
        add_gram(self._gram, hat, omega)
        if self._cross is not None:
            add_products(self._cross, dense, hat, omega)
        for role in self._power:
            output = self._output(role, hat if dense is None else dense)  # (b, T, O)
            output = output if omega is None else output * omega[..., None]  # (b, T, O)
            self._power[role] += output.pow(2).sum()

    def _output(self, role: str, x: torch.Tensor) -> torch.Tensor:
        """W x in fp32 without its bias: (b, T, C) -> (b, T, O)."""
        return nn.functional.linear(x, self._linears[role].weight.to(x.device)).float()

    def finish(self) -> InputProducts:
        gram = mirror(self._gram)
        power = {role: float(total) for role, total in self._power.items()}
        return InputProducts(gram, gram if self._cross is None else self._cross, power)
