"""What refits are computed from: weighted second moments of inputs and target outputs, and the error they give."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn

from structprune.errors import UserError
from structprune.models.maps import in_place_of
from structprune.statistics.activations import add_gram, add_products, empty_sum, mirror
from structprune.statistics.overflow import place
from structprune.workers import ALONE, Workers

UNCHANGED = float("inf")  # the damping at which no weight changes
NOISE = 1e-6  # smaller gains are below the accuracy of fp32 products, relative to the power of the output


Choice = tuple[torch.Tensor, float, float]  # weight, damping, held-out output error minus the unchanged weight's


@dataclass(frozen=True)
class Products:
    """Second moments of one linear: Gram matrix (K, K), target W XᵀX̂ (O, K), and power ‖W Xᵀ‖² of the target output.

    They may be fp32: fp64 copies of all would be the peak of memory.
    """

    gram: torch.Tensor
    target: torch.Tensor
    power: float

    @classmethod
    def of_sums(cls, sums: list[torch.Tensor]) -> "Products":
        """Of finished sums, which it takes from the list: Gram matrix (K, K), target (O, K), and power (1, 1).

        Their fp64 digits have done their work, so these become fp32, one after the other. A constant's column alone
        (K, 1) stays as it is: a mean residual is a small difference of large sums.
        """
        gram, target, power = sums
        sums.clear()
        if gram.shape[0] != gram.shape[1]:
            return cls(gram, target, float(power))
        gram = mirror(gram).float()
        target = target.float()
        return cls(gram, target, float(power))


@dataclass(frozen=True)
class LayerFit:
    """What the refit of one linear chose."""

    block: int
    kind: str  # the kind of unit it reads, or its role
    damping: float  # infinity where nothing changed
    error: float  # held-out output error, 1 without the refit

    @classmethod
    def of(cls, block: int, kind: str, weight: torch.Tensor, check: Products, choice: Choice) -> "LayerFit":
        """The fit of a linear whose unchanged weight (O, K) fp64 has the held-out products `check`.

        Raises:
            UserError: products that are not finite.
        """
        plain = output_error(weight, check.target, check.gram) + check.power
        if not math.isfinite(plain + choice[2]):
            remedy = "use model.dtype = float32 if it is not, or reconstruct.enabled = false"
            raise UserError(f"{place(block, kind)}: the sums of its refit overflow: {remedy}")
        return cls(block, kind, choice[1], (plain + choice[2]) / plain if plain > 0 else 1.0)

    def plain(self) -> dict:
        """As plain data for JSON, where infinity is null."""
        return asdict(self) | {"damping": None if self.damping == UNCHANGED else self.damping}


def output_error(weight: torch.Tensor, target: torch.Tensor, gram: torch.Tensor) -> float:
    """‖W_new X̂ᵀ - W Xᵀ‖² without the part that no W_new changes: tr(W_new G W_newᵀ) - 2 tr(W_new (W·C)ᵀ)."""
    return output_errors(weight[None], target, gram)[0]


def output_errors(weights: torch.Tensor, target: torch.Tensor, gram: torch.Tensor) -> list[float]:
    """`output_error` of several weights (n, O, K), with one device sync."""
    terms = (weights @ gram.double()).sub_(target, alpha=2)  # (n, O, K)
    return terms.mul_(weights).sum((1, 2)).tolist()


@dataclass(frozen=True)
class InputProducts:
    """Sums over rows of the input that several linears share."""

    gram: torch.Tensor  # (C, C) fp32 X̂ᵀX̂
    cross: torch.Tensor  # (C, C) fp32 XᵀX̂; the same tensor where X is X̂
    power: dict[str, float]  # role -> ‖W Xᵀ‖² over held-out rows; empty for other rows

    def of(self, role: str, weight: torch.Tensor) -> Products:
        """The products of one linear in fp64, whose dense weight (O, C) gives the target outputs."""
        target = weight.detach().to(self.gram.device).double() @ self.cross.double()  # (O, C)
        return Products(self.gram.double(), target, self.power.get(role, float("nan")))


class RowSums:
    """Sums products over the rows of one purpose; `finish` returns them.

    Args:
        linears: role -> dense linear, all with the same C inputs.
        cross: whether X differs from X̂. power: whether to sum ‖W Xᵀ‖².
    """

    def __init__(self, linears: dict[str, nn.Linear], device: torch.device, cross: bool, power: bool):
        size = next(iter(linears.values())).in_features
        self._linears = linears
        self._gram = empty_sum(size, size, device)  # (C, C)
        self._cross = empty_sum(size, size, device) if cross else None  # (C, C)
        # sums stay on the device until the last batch: reading one earlier would be a device sync
        self._power = {role: torch.zeros((), dtype=torch.float64, device=device) for role in linears if power}

    def add(self, pruned: torch.Tensor, dense: torch.Tensor | None, omega: torch.Tensor | None) -> None:
        """Add rows X̂ and X (None: X̂ itself), (b, T, C) each, weighted by ω (b, T), None for ones."""
        add_gram(self._gram, pruned, omega)
        source = pruned if dense is None else dense  # (b, T, C)
        if self._cross is not None:
            add_products(self._cross, source, pruned, omega)
        for role in self._power:
            weight = self._linears[role].weight.to(source.device, source.dtype)  # (O, C)
            output = nn.functional.linear(source, weight).float()  # (b, T, O), without the bias
            output = output if omega is None else output * omega[..., None]  # (b, T, O)
            self._power[role] += output.pow(2).sum()

    def finish(self, workers: Workers = ALONE) -> InputProducts:
        """The sums over the rows of all processes; to be called once, since it replaces them one by one."""
        cross = [] if self._cross is None else [self._cross]
        workers.add_up(self._gram, *cross, *self._power.values())
        self._gram = gram = mirror(self._gram).float()
        if self._cross is not None:
            self._cross = self._cross.float()
        power = {role: float(total) for role, total in self._power.items()}
        return InputProducts(gram, gram if self._cross is None else self._cross, power)


def set_weight(linear: nn.Linear, weight: torch.Tensor, constant: bool) -> None:
    """Give a linear new weights (O, C), and with a constant feature a bias from the last column of (O, C + 1)."""
    linear.weight = as_parameter(weight[:, :-1] if constant else weight, linear.weight)
    if constant:
        linear.bias = as_parameter(weight[:, -1], linear.bias)


def as_parameter(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """A parameter in the dtype and on the device of another."""
    return nn.Parameter(in_place_of(like, value), requires_grad=like.requires_grad)
