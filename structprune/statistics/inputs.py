"""The inputs of a block's linears and their norms: one statistic for all linears that read the same input."""

from dataclasses import dataclass

import torch

from structprune.models.adapter import BlockView
from structprune.statistics.activations import relative_weight, squared_norms
from structprune.statistics.capture import watch_inputs

InputKey = tuple[int, str]  # (block index, input: a key of READERS)
# input -> the norm that reads the residual stream which the output of its reader is added to
STREAM = {"mixed": "attention_norm", "activated": "mlp_norm"}


@dataclass(frozen=True)
class Inputs:
    """One block's forward pass over some sequences, up to its last linear."""

    read: dict[str, torch.Tensor]  # input, a key of `READERS` -> (b, T, C)
    stream: dict[str, torch.Tensor]  # input -> the residual stream (b, T, C) that the output of its reader is added to

    def weight(self, name: str, weight: torch.Tensor | None, relative: bool) -> torch.Tensor | None:
        """Row weights (b, T) of an input: ω, divided by the RMS of the stream that its reader adds to if `relative`."""
        return relative_weight(self.stream[name], weight) if relative and name in self.stream else weight


def block_inputs(block: BlockView, x: torch.Tensor, rotary) -> Inputs:
    """Run a block on (b, T, C), except for its down projection."""
    inputs: dict[str, torch.Tensor] = {}
    with watch_inputs({"attention_input": block["query"]}, inputs.__setitem__):
        mixed = block.module.mix(x, rotary)  # (b, T, H*D)
    return _after_attention(block, x, mixed, inputs["attention_input"])


def read_input(block: BlockView, name: str, x: torch.Tensor, rotary) -> torch.Tensor:
    """One input of a block's linears, (b, T, .), from the stream before their half of the block (b, T, C)."""
    if name == "mixed":
        return block.module.mix(x, rotary)
    if name == "activated":
        return block.module.activate(x)
    return block.module.part("attention_norm" if name == "attention_input" else "mlp_norm")(x)


def inputs_of_rows(block: BlockView, x: torch.Tensor, mixed: torch.Tensor) -> Inputs:
    """`block_inputs` of some rows (b, r, C), from their attention output (b, r, H*D): the rest works row by row."""
    return _after_attention(block, x, mixed, block.module.part("attention_norm")(x))


def _after_attention(block: BlockView, x: torch.Tensor, mixed: torch.Tensor, attention_input: torch.Tensor) -> Inputs:
    read = {"attention_input": attention_input, "mixed": mixed}
    middle = x + block["attention_output"](mixed)  # (b, T, C)
    with watch_inputs({"mlp_input": block["gate"]}, read.__setitem__):
        read["activated"] = block.module.activate(middle)  # (b, T, M)
    return Inputs(read, {"mixed": x, "activated": middle})


class InputNorms:
    """Norms of the features of every linear's input over weighted rows.

    Args:
        summed: Σ over sequences of ‖X̃[:, c]‖ instead of ‖X̃[:, c]‖ over all rows (docs/methods.md section 4).
    """

    def __init__(self, summed: bool = False):
        self._summed = summed
        self._totals: dict = {}

    def add(self, key, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Count rows x (b, T, C) weighted by ω (b, T)."""
        self.add_squares(key, squared_norms(x, weight))

    def add_squares(self, key, squares: torch.Tensor) -> None:
        """Count Σ_t (ω x)² of some sequences, (b, C)."""
        part = (squares.sqrt() if self._summed else squares).sum(0, dtype=torch.float64)  # (C,)
        self._totals[key] = self._totals[key] + part if key in self._totals else part

    @property
    def norms(self) -> dict:
        """Key -> (C,) fp64."""
        return {key: total if self._summed else total.sqrt() for key, total in self._totals.items()}
