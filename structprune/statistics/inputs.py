"""What the linears of a block read, and its norms: one statistic for all that read the same."""

from dataclasses import dataclass

import torch

from structprune.models.adapter import BlockView
from structprune.statistics.activations import relative_weight, squared_norms
from structprune.statistics.capture import watch_inputs

Key = tuple[int, str]  # (block index, what is read: a key of READERS)
STREAM = {"mixed": "attention_norm", "activated": "mlp_norm"}  # input -> the norm that reads the stream it is added to


@dataclass(frozen=True)
class Inputs:
    """One block's forward pass over some sequences, up to its last linear.

    Attributes:
        read: input -> (b, T, C), by the keys of `READERS`.
        stream: input -> the residual stream (b, T, C) that the output of its reader is added to.
    """

    read: dict[str, torch.Tensor]
    stream: dict[str, torch.Tensor]

    def weight(self, name: str, weight: torch.Tensor | None, relative: bool) -> torch.Tensor | None:
        """Row weights (b, T) of an input: ω, for what is added to the stream divided by its RMS if `relative`."""
        return relative_weight(self.stream[name], weight) if relative and name in self.stream else weight


def block_inputs(block: BlockView, x: torch.Tensor, rotary) -> Inputs:
    """Run a block on (b, T, C) but for its down projection."""
    seen: dict[str, torch.Tensor] = {}
    with watch_inputs({"attention_input": block["query"]}, seen.__setitem__):
        mixed = block.module.mix(x, rotary)  # (b, T, H*D)
    return _behind_attention(block, x, mixed, seen["attention_input"])


def read_input(block: BlockView, name: str, x: torch.Tensor, rotary) -> torch.Tensor:
    """What the linears of one input read, (b, T, .), from the stream before the half of the block they are in."""
    if name == "mixed":
        return block.module.mix(x, rotary)
    if name == "activated":
        return block.module.activate(x)
    return block.module.part("attention_norm" if name == "attention_input" else "mlp_norm")(x)


def inputs_of_rows(block: BlockView, x: torch.Tensor, mixed: torch.Tensor) -> Inputs:
    """`block_inputs` for some rows (b, r, C), from what attention gave them (b, r, H*D): the rest is row by row."""
    return _behind_attention(block, x, mixed, block.module.part("attention_norm")(x))


def _behind_attention(block: BlockView, x: torch.Tensor, mixed: torch.Tensor, attention_input: torch.Tensor) -> Inputs:
    read = {"attention_input": attention_input, "mixed": mixed}
    middle = x + block["attention_output"](mixed)  # (b, T, C)
    with watch_inputs({"mlp_input": block["gate"]}, read.__setitem__):
        read["activated"] = block.module.activate(middle)  # (b, T, M)
    return Inputs(read, {"mixed": x, "activated": middle})


class InputNorms:
    """Norms of the features of every linear's input over weighted rows; `norms` gives them.

    Args:
        summed: Σ over sequences of ‖X̃[:, c]‖ instead of ‖X̃[:, c]‖ over all rows (docs/methods.md section 4).
    """

    def __init__(self, summed: bool = False):
        self._summed, self._totals = summed, {}

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
