"""The inputs of a block's linears and their norms: one statistic for all linears that read the same input."""

from dataclasses import dataclass

import torch
from torch import nn

from structprune.models.adapter import BlockView
from structprune.models.experts_structprune import role_and_part
from structprune.models.layers_structprune import AttentionContext
from structprune.statistics.activations import relative_weight, row_squares, squared_norms
from structprune.statistics.capture import watch_inputs, watch_tokens
from structprune.workers import ALONE, Workers

InputKey = tuple[int, str]  # (block index, input: a key of `BlockView.readers`)
# input -> the norm that reads the residual stream which the output of its reader is added to
STREAM = {"mixed": "attention_norm", "activated": "mlp_norm"}


@dataclass(frozen=True)
class Inputs:
    """One block's forward pass over some sequences, up to its down projection."""

    read: dict[str, torch.Tensor]  # each input, a key of `BlockView.readers` -> (b, T, C), an expert's (m, C)
    stream: dict[str, torch.Tensor]  # input -> the residual stream (b, T, C) that the output of its reader is added to
    middle: torch.Tensor  # (b, T, C) the residual stream before the MLP; without one, after the block
    tokens: dict[str, torch.Tensor]  # input of an expert -> which of the b * T tokens it sees, (m,) int64
    after: torch.Tensor | None = None  # (b, T, C) the residual stream after a mixture of experts

    def weight(self, name: str, weight: torch.Tensor | None, relative: bool) -> torch.Tensor | None:
        """Row weights of an input: ω (b, T), divided by the RMS of the stream that its reader adds to if `relative`.

        An expert's are those of the tokens that it sees, (m,).
        """
        stream = role_and_part(name)[0]
        if relative and stream in self.stream:
            weight = relative_weight(self.stream[stream], weight)  # (b, T)
        return weight if weight is None or name not in self.tokens else weight.flatten()[self.tokens[name]]

    def sequences(self, name: str) -> torch.Tensor | None:
        """Which sequence each row of an expert's input is of, (m,); None of an input of all tokens."""
        return self.tokens[name] // self.middle.shape[1] if name in self.tokens else None


def block_inputs(block: BlockView, x: torch.Tensor, context: AttentionContext) -> Inputs:
    """Run a block on (b, T, C), except for its down projection."""
    read: dict[str, torch.Tensor] = {}
    if "mixed" in block.readers:
        with watch_inputs({"attention_input": block["query"]}, read.__setitem__):
            read["mixed"] = block.module.mix(x, *context)  # (b, T, H*D)
    return inputs_after_attention(block, x, read)


def block_output(block: BlockView, inputs: Inputs) -> torch.Tensor:
    """The residual stream after a block that has read `inputs`, (b, T, C)."""
    if inputs.after is not None:
        return inputs.after
    if "activated" not in inputs.read:
        return inputs.middle
    return inputs.middle + block["down"](inputs.read["activated"])  # (b, T, C)


def inputs_of_rows(block: BlockView, x: torch.Tensor, mixed: torch.Tensor) -> Inputs:
    """`block_inputs` of some rows (b, r, C), from their attention output: the rest works row by row.

    Args:
        mixed: (b, r, H*D); without a column where the block has no attention.
    """
    read = {}
    if "mixed" in block.readers:
        read = {"attention_input": block.read("attention_input", x), "mixed": mixed}
    return inputs_after_attention(block, x, read)


def inputs_after_attention(block: BlockView, x: torch.Tensor, read: dict[str, torch.Tensor] | None = None) -> Inputs:
    """Run the rest of a block on (b, T, C).

    Args:
        read: the inputs of the attention's linears on x; None where the stream is behind attention already.
    """
    read = {} if read is None else read
    stream, middle = {}, x
    if "mixed" in read:
        stream["mixed"], middle = x, x + block["attention_output"](read["mixed"])  # (b, T, C) each
    if "activated" in block.readers:
        with watch_inputs({"mlp_input": block["gate"]}, read.__setitem__):
            read["activated"] = block.module.activate(middle)  # (b, T, M)
        stream["activated"] = middle
    if not block.mixture:
        return Inputs(read, stream, middle, {})
    stream["activated"], linears = middle, mixture_linears(block)
    tokens: dict[str, torch.Tensor] = {}

    def note(key: InputKey, seen: torch.Tensor) -> None:
        tokens[key[1]] = seen

    with watch_tokens([block], note), watch_inputs(linears, read.__setitem__):
        after = block.module.add_mlp(middle)  # (b, T, C)
    return Inputs(read, stream, middle, tokens, after)


def mixture_linears(block: BlockView) -> dict[str, nn.Linear]:
    """Input of a mixture of experts -> the first linear that reads it."""
    return {name: block[roles[0]] for name, roles in block.readers.items() if role_and_part(name)[1]}


class InputNorms:
    """Norms of the features of every linear's input over weighted rows.

    Args:
        summed: Σ over sequences of ‖X̃[:, c]‖ instead of ‖X̃[:, c]‖ over all rows (docs/methods.md section 4).
    """

    def __init__(self, summed: bool = False):
        self._summed = summed
        self._totals: dict = {}

    def add(self, key, x: torch.Tensor, weight: torch.Tensor | None, sequences: torch.Tensor | None = None) -> None:
        """Count rows x (b, T, C) weighted by ω (b, T); or single ones, (m, C) and (m,), of `sequences` (m,)."""
        squares = squared_norms(x, weight) if sequences is None else row_squares(x, weight, sequences)  # (b, C)
        self.add_squares(key, squares)

    def add_squares(self, key, squares: torch.Tensor) -> None:
        """Count Σ_t (ω x)² of some sequences, (b, C)."""
        part = (squares.sqrt() if self._summed else squares).sum(0, dtype=torch.float64)  # (C,)
        self._totals[key] = self._totals[key] + part if key in self._totals else part

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums so far, under names of their own."""
        return {f"{index} {name}": total for (index, name), total in self._totals.items()}

    def restore(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Begin with the sums of `tensors`."""
        for place, total in tensors.items():
            index, name = place.split()
            self._totals[int(index), name] = total.to(device)

    def norms(self, workers: Workers = ALONE) -> dict:
        """Key -> (C,) fp64, over the rows of all processes."""
        workers.add_up(*(self._totals[key] for key in sorted(self._totals)))
        return {key: total if self._summed else total.sqrt() for key, total in self._totals.items()}
