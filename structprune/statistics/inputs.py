"""What the linears of a block read, and its statistics: norms and Grams, one for all that read the same."""

from dataclasses import dataclass

import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.adapter import READERS, Adapter, BlockView
from structprune.statistics.activations import relative_weight, squared_norms
from structprune.statistics.capture import MassMeter, watch_inputs
from structprune.statistics.rows import Track, arm_ids, arm_weights, mass_of, measure_mass, needs_sinks, untracked

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
    read: dict[str, torch.Tensor] = {}
    with watch_inputs({"attention_input": block["query"], "mlp_input": block["gate"]}, read.__setitem__):
        read["mixed"] = block.module.mix(x, rotary)  # (b, T, H*D)
        middle = x + block["attention_output"](read["mixed"])  # (b, T, C)
        read["activated"] = block.module.activate(middle)  # (b, T, M)
    return Inputs(read, {"mixed": x, "activated": middle})


class InputNorms:
    """Norms of the features of every linear's input over weighted rows; `norms` gives them.

    Args:
        summed: Σ over sequences of ‖X̃[:, c]‖ instead of ‖X̃[:, c]‖ over all rows (METHODS.md section 4).
    """

    def __init__(self, summed: bool = False):
        self._summed, self._totals = summed, {}

    def add(self, key, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Count rows x (b, T, C) weighted by ω (b, T)."""
        squares = squared_norms(x, weight)  # (b, C)
        part = (squares.sqrt() if self._summed else squares).sum(0, dtype=torch.float64)  # (C,)
        self._totals[key] = self._totals[key] + part if key in self._totals else part

    @property
    def norms(self) -> dict:
        """Key -> (C,) fp64."""
        return {key: total if self._summed else total.sqrt() for key, total in self._totals.items()}


@torch.inference_mode()
def one_shot_norms(
    adapter: Adapter,
    calibration: Calibration,
    arm: str,
    sink: SinkSettings,
    summed: bool = False,
    relative: bool = False,
    batch: int = 1,
    budget: int = 2**33,
    track: Track = untracked,
) -> dict[Key, torch.Tensor]:
    """Norms of what every linear of the dense model reads over the rows of `arm`: one forward pass a sequence.

    The weights of the noisy sink arm are known only when a pass has ended: within `budget` bytes every input is held
    until then, beyond it the pass is run twice. Both give the same numbers.

    Args:
        batch: sequences in a forward pass.
    Returns:
        (block, input) -> (C,) fp64.
    """
    counted, ids = InputNorms(summed), arm_ids(calibration, arm)  # (N, R, T)
    late = needs_sinks(arm) and arm.startswith("masked")
    weights = None
    if needs_sinks(arm) and not late:
        mass = measure_mass(adapter, calibration, batch, track)  # (N, S, T)
        weights = arm_weights(mass, arm, sink).flatten(0, 1)  # (N, T)
    ids = ids.flatten(0, 1)  # (R, T)
    for start in track(range(0, len(ids), batch), f"norms ({arm})"):
        rows = slice(start, start + batch)
        part = ids[rows].to(adapter.device)  # (b, T)
        if late:
            _add_late(adapter, part, counted, sink, relative, budget)
        else:
            weight = None if weights is None else weights[rows].to(adapter.device)  # (b, T)
            _add(adapter, part, counted, weight, relative)
    return counted.norms


def _linears(adapter: Adapter) -> dict:
    """(block, input) -> the first linear that reads it."""
    return {(block.index, name): block[roles[0]] for block in adapter.blocks for name, roles in READERS.items()}


def _norms(adapter: Adapter, relative: bool) -> dict:
    """(block, input) -> the norm whose input is the stream that the input's reader writes to."""
    blocks = adapter.blocks if relative else []
    return {(block.index, name): block.module.part(role) for block in blocks for name, role in STREAM.items()}


def _add(adapter: Adapter, ids: torch.Tensor, counted: InputNorms, weight, relative: bool) -> None:
    """One forward pass over (b, T) ids whose row weights are known."""
    scales: dict[Key, torch.Tensor] = {}

    def visit(key: Key, x: torch.Tensor) -> None:
        scale = scales.pop(key, None)  # (b, T)
        counted.add(key, x, weight if scale is None else scale if weight is None else scale * weight)

    with watch_inputs(_norms(adapter, relative), lambda key, x: scales.__setitem__(key, relative_weight(x, None))):
        with watch_inputs(_linears(adapter), visit):
            adapter.model.encode(ids)


def _add_late(adapter: Adapter, ids: torch.Tensor, counted: InputNorms, sink, relative: bool, budget: int) -> None:
    """As `_add`, the row weights being those of the pass's own attention mass.

    They are known once the last block has attended: what is read before is held until then, if it fits.
    """
    linears, last = _linears(adapter), adapter.blocks[-1].index
    early = {key: linear for key, linear in linears.items() if key[0] != last or key[1] == "attention_input"}
    size = ids.numel() * adapter.model.embedding.weight.element_size()
    if size * sum(linear.in_features for linear in early.values()) > budget:
        weight = arm_weights(mass_of(adapter, ids)[:, None], "masked+sink", sink)[:, 0]  # (b, T)
        _add(adapter, ids, counted, weight, relative)
        return
    scales: dict[Key, torch.Tensor] = {}
    held: dict[Key, torch.Tensor] = {}
    known: list[torch.Tensor] = []

    def count(key: Key, x: torch.Tensor) -> None:
        scale = scales.pop(key, None)  # (b, T)
        counted.add(key, x, known[0] if scale is None else scale * known[0])

    def visit(key: Key, x: torch.Tensor) -> None:
        if key in early:
            held[key] = x
            return
        if not known:
            known.append(arm_weights(meter.take()[:, None], "masked+sink", sink)[:, 0])  # (b, T)
            for each in list(held):
                count(each, held.pop(each))
        count(key, x)

    with MassMeter().on([block.core for block in adapter.blocks]) as meter, watch_inputs(linears, visit):
        with watch_inputs(_norms(adapter, relative), lambda key, x: scales.__setitem__(key, relative_weight(x, None))):
            adapter.model.encode(ids)
