"""Norms of what every linear of the dense model reads, on any arm, in one forward pass a sequence.

The row weights of the noisy sink arm are known only when the last block has attended. Until then what a linear reads
would have to be held for every row. But nearly all rows weigh 1 in the end, so what is held are squares of the rows
with most attention mass so far, sums of squares over groups of other rows of like mass, and what rows can be made again
from; groups whose rows do not weigh the same in the end are made again row by row.
"""

from dataclasses import dataclass

import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.adapter import READERS, Adapter, BlockView
from structprune.models.transfer import send
from structprune.statistics.activations import relative_weight, squared_norms
from structprune.statistics.capture import MassMeter, watch_inputs
from structprune.statistics.inputs import STREAM, InputNorms, Inputs, Key, block_inputs, inputs_of_rows
from structprune.statistics.rows import (
    Observe,
    Track,
    arm_ids,
    arm_weights,
    mass_of,
    measure_mass,
    needs_sinks,
    unobserved,
    untracked,
)

SINGLE = 8  # one row in so many is a group of its own: those that may well weigh less
GROUP = 12  # rows in other groups: fewer hold more, more make more rows again
SAME = 3e-5  # a group whose weights differ by less counts with their mean square; norms move by a few 1e-6 at most


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
    observe: Observe = unobserved,
) -> dict[Key, torch.Tensor]:
    """Norms of every linear's input over the rows of `arm`.

    Args:
        batch: sequences in a forward pass.
        budget: bytes; where what is held for the noisy sink arm exceeds them, the pass is run twice. Both give the same
            numbers.
        observe: is shown the mass that sink weights are made from, in the order of the sequences.
    Returns:
        (block, input) -> (C,) fp64.
    """
    counted, ids = InputNorms(summed), arm_ids(calibration, arm)  # (N, R, T)
    late, room = weighs_late(arm, sink), None
    weights = None
    if needs_sinks(arm, sink) and not late:
        mass = measure_mass(adapter, calibration, batch, track, observe)  # (N, S, T)
        weights = arm_weights(mass, arm, sink).flatten(0, 1)  # (N*R, T)
    ids = ids.flatten(0, 1)  # (R, T)
    for start in track(range(0, len(ids), batch), f"norms ({arm})"):
        rows = slice(start, start + batch)
        part = send(ids[rows], adapter.device)  # (b, T)
        if late and held_bytes(adapter, part.numel()) <= budget:
            room = room or [_Held.empty(block, part.shape) for block in adapter.blocks[:-1]]
            mass = _add_late(adapter, part, [held.first(len(part)) for held in room], counted, sink, relative)
            observe(mass)  # (b, T)
            continue
        weight = None if weights is None else send(weights[rows], adapter.device)  # (b, T)
        if late:
            observe(mass := mass_of(adapter, part))  # (b, T)
            weight = _late_weight(mass, sink)  # (b, T)
        _add(adapter, part, counted, weight, relative)
    return counted.norms


def weighs_late(arm: str | None, sink: SinkSettings) -> bool:
    """Whether a noisy sequence's row weights are known once its own pass has ended.

    A policy that compares the levels of a window must know all of them, which a batch of sequences need not hold: there
    the mass is measured by a pass of its own first.
    """
    return needs_sinks(arm, sink) and arm.startswith("masked") and sink.policy == "all"


def held_bytes(adapter: Adapter, tokens: int, itemsize: int | None = None) -> int:
    """Bytes held for the noisy sink arm until its row weights are known; `itemsize` of a hidden state (the model's)."""
    hidden, size = adapter.hidden_size, itemsize or adapter.model.embedding.weight.element_size()
    numbers = 0.0
    for block in adapter.blocks[:-1]:
        grouped = sum(block[READERS[name][0]].in_features for name in READERS if name != "mixed")
        numbers += size * (hidden + block["attention_output"].in_features) + 4 * grouped * (
            1 / SINGLE + (1 - 1 / SINGLE) / GROUP
        )
    return int(tokens * numbers)


def _late_weight(mass: torch.Tensor, sink: SinkSettings) -> torch.Tensor:
    """Row weights (b, T) of noisy sequences from their own mass (b, T)."""
    return arm_weights(mass[:, None], "masked+sink", sink)[:, 0]


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


@dataclass(frozen=True)
class _Held:
    """One block's inputs until the row weights are known.

    Attributes:
        x: (b, T, C) the block's input. mixed: (b, T, H*D) what its attention output reads.
        order: (b, T) int64 rows: the first T // `SINGLE` are groups of their own, then `GROUP` neighbours each are one.
        sums: input -> (b, G, C) sums of squares over groups.
    """

    x: torch.Tensor
    mixed: torch.Tensor
    order: torch.Tensor
    sums: dict[str, torch.Tensor]

    @classmethod
    def empty(cls, block: BlockView, shape: torch.Size) -> "_Held":
        """Room for ids of a (b, T) shape. It serves all batches: fresh memory amid what comes and goes in a pass would
        leave holes in the heap, up to half as much again."""
        place = {"device": block["query"].weight.device, "dtype": block["query"].weight.dtype}
        widths = {name: block[roles[0]].in_features for name, roles in READERS.items()}
        x = torch.empty(*shape, widths["attention_input"], **place)  # (b, T, C)
        mixed = torch.empty(*shape, widths.pop("mixed"), **place)  # (b, T, H*D)
        order = torch.empty(shape, dtype=torch.int64, device=place["device"])  # (b, T)
        single, groups = _groups(shape[1])
        sums = {n: torch.empty(shape[0], single + groups, c, device=place["device"]) for n, c in widths.items()}
        return cls(x, mixed, order, sums)  # sums: (b, G, C)

    def first(self, count: int) -> "_Held":
        """The room of the first `count` sequences."""
        sums = {name: value[:count] for name, value in self.sums.items()}
        return _Held(self.x[:count], self.mixed[:count], self.order[:count], sums)

    def fill(self, found: Inputs, x: torch.Tensor, mass: torch.Tensor, relative: bool) -> None:
        """Hold a block's inputs, given the attention mass (b, T) so far."""
        self.x.copy_(x)
        self.mixed.copy_(found.read["mixed"])
        # by mass, so that rows that may weigh less than 1 come together
        self.order.copy_(mass.argsort(dim=1, descending=True))
        for name, sums in self.sums.items():
            _grouped_squares(found.read[name], self.order, found.weight(name, None, relative), sums)


def _groups(length: int) -> tuple[int, int]:
    """Rows that are groups of their own, and the number of other groups, of `length` rows."""
    single = length // SINGLE
    return single, -(-(length - single) // GROUP)


def _add_late(
    adapter: Adapter, ids: torch.Tensor, room: list[_Held], counted: InputNorms, sink: SinkSettings, relative: bool
) -> torch.Tensor:
    """One forward pass over (b, T) ids, whose row weights are those of its own attention mass (b, T), returned."""
    x = adapter.model.embedding(ids)  # (b, T, C)
    rotary, *blocks = adapter.model.rotary(ids.shape[1], adapter.device), *adapter.blocks
    with MassMeter().on([block.core for block in blocks]) as meter:
        for block, held in zip(blocks, room):
            found = block_inputs(block, x, rotary)
            held.fill(found, x, meter.so_far, relative)
            x = found.stream["activated"] + block["down"](found.read["activated"])  # (b, T, C)
            del found  # or it would be beside the next block's
        last = block_inputs(blocks[-1], x, rotary)
        mass = meter.take()  # (b, T)
    weight = _late_weight(mass, sink)  # (b, T)
    for name, value in last.read.items():
        counted.add((blocks[-1].index, name), value, last.weight(name, weight, relative))
    grouped = [_by_group(weight, held.order) for held in room]  # ((b, G), (b, G)) each
    # one look of the host at all blocks' groups, not one a sequence and block
    apart = torch.stack([apart for _, apart in grouped]).cpu() if grouped else []  # (blocks, b, G)
    for block, held, (squared, _), groups in zip(blocks, room, grouped, apart):
        _count(block, held, counted, weight, relative, squared, groups)
    return mass


def _grouped_squares(x: torch.Tensor, order: torch.Tensor, weight: torch.Tensor | None, sums: torch.Tensor) -> None:
    """Sums of squares over groups of rows: x (b, T, C), order and weight (b, T), into sums (b, G, C) fp32.

    Groups are gathered member by member, which takes a third of the time of squaring all and scattering the sums.
    """
    single, _ = _groups(order.shape[1])
    for index, ranks in enumerate(order):
        members = [ranks[:single]] + [ranks[single + member :: GROUP] for member in range(GROUP)]
        for member, rows in enumerate(members):  # of a last group that is not full there may be one row fewer
            part = x[index].index_select(0, rows).float()  # (g, C)
            if weight is not None:
                part = part * weight[index, rows, None]  # (g, C)
            total = sums[index, :single] if member == 0 else sums[index, single : single + len(rows)]  # (g, C)
            torch.mul(part, part, out=total) if member < 2 else total.addcmul_(part, part)


def _by_group(weight: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ω² of every group, and whether its weights differ: (b, T) each -> (b, G) each."""
    ranked, (single, _) = weight.gather(1, order), _groups(order.shape[1])  # (b, T)
    alone, rest = ranked[:, :single], ranked[:, single:]
    missing = -rest.shape[1] % GROUP  # of a last group that is not full; its last weight stands in
    rest = torch.cat((rest, rest[:, -1:].expand(-1, missing)), dim=1).unflatten(1, (-1, GROUP))  # (b, g, GROUP)
    apart = rest.amax(2) - rest.amin(2) > SAME  # (b, g)
    squared = torch.cat((alone.square(), rest.square().mean(2)), dim=1)  # (b, G)
    return squared, torch.cat((torch.zeros_like(alone, dtype=torch.bool), apart), dim=1)


def _count(
    block: BlockView, held: _Held, counted: InputNorms, weight: torch.Tensor, relative: bool, squared: torch.Tensor,
    apart: torch.Tensor,
) -> None:  # fmt: skip
    """Squares of what a block's linears read: whole groups where their rows weigh the same, else row by row.

    Args:
        weight: (b, T). squared: (b, G) and apart: (b, G) on the host, of `_by_group`.
    """
    scale = relative_weight(held.x, weight) if relative else weight  # (b, T)
    counted.add((block.index, "mixed"), held.mixed, scale)
    whole = squared * send(~apart, squared.device)  # (b, G)
    squares = {name: torch.bmm(whole[:, None], sums)[:, 0] for name, sums in held.sums.items()}  # (b, C)
    single, _ = _groups(held.order.shape[1])
    for index, groups in enumerate(apart):
        others = held.order[index, single:]  # (T - single,)
        places = groups[single:].repeat_interleave(GROUP)[: len(others)].nonzero()[:, 0]  # (r,), on the host
        if not len(places):
            continue
        rows = others[send(places, others.device)]  # (r,)
        made = inputs_of_rows(block, held.x[index, rows][None], held.mixed[index, rows][None])
        part = weight[index, rows][None]  # (1, r)
        for name in squares:
            squares[name][index] += squared_norms(made.read[name], made.weight(name, part, relative))[0]  # (C,)
    for name, value in squares.items():
        counted.add_squares((block.index, name), value)
