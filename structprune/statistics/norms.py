"""Norms of the inputs of every linear of the dense model, on any arm, in one forward pass per sequence.

The row weights of the noisy sink arm are known only after the last block's attention. Holding every input until then
would take too much memory, but in the end nearly all rows have weight 1. So each block holds the squares of the rows
with the most attention mass so far, sums of squares over groups of other rows of similar mass, and enough to compute
single rows again. A group whose rows end up with different weights is computed again row by row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from structprune.config import SinkSettings
from structprune.models.adapter import Adapter, BlockView
from structprune.models.encode import encode_rows
from structprune.models.experts_structprune import role_and_part
from structprune.models.transfer import send
from structprune.statistics.activations import relative_weight, squared_norms
from structprune.statistics.capture import MassMeter, watch_inputs, watch_tokens
from structprune.statistics.inputs import (
    STREAM,
    InputKey,
    InputNorms,
    Inputs,
    block_inputs,
    block_output,
    inputs_of_rows,
)
from structprune.statistics.pass_parts import PassParts
from structprune.statistics.rows import arm_ids, arm_weights, mass_of, measure_mass, needs_sinks, use_weights
from structprune.statistics.scan import Scan

SINGLE = 8  # one row in so many is a group of its own: those that may well weigh less than 1
GROUP = 12  # rows in each other group: smaller groups hold more, larger ones compute more rows again
SAME = 3e-5  # weights within a group that differ by less count as their mean square; norms move by at most a few 1e-6


@torch.inference_mode()
def one_shot_norms(scan: Scan, arm: str, summed: bool = False, relative: bool = False) -> dict[InputKey, torch.Tensor]:
    """Norms of every linear's input over the rows of `arm`.

    Where the inputs held for the noisy sink arm exceed the budget, the pass runs twice. Both give the same numbers.

    Args:
        summed: sum norms over sequences instead of one norm over all rows (`InputNorms`).
        relative: divide row weights by the RMS of the residual stream that a linear adds to.
    Returns:
        (block, input) -> (C,) fp64.
    """
    adapter, norms, ids = scan.adapter, InputNorms(summed), arm_ids(scan.calibration, arm, scan.layout)  # (N, R, T)
    late, weights = weighs_late(arm, scan.sink), None
    if needs_sinks(arm, scan.sink) and not late:
        weights = arm_weights(measure_mass(scan), arm, scan.sink).flatten(0, 1)  # (N*R, T)
    weights = weights if late else use_weights(weights, ids.flatten(0, 1).shape, scan)  # (N*R, T)
    batch, ids = scan.sequences(ids.shape[1]), ids.flatten(0, 1)  # (R, T)
    late_pass, starts = _LatePass(scan, norms, relative), range(0, len(ids), batch)
    parts = PassParts(scan, f"norms-{arm}-{'summed' * summed}-{'relative' * relative}", ids, batch)
    done, sums = parts.restore()
    norms.restore(sums, adapter.device)
    for number, start in enumerate(scan.track(starts[done:], f"norms ({arm})"), done + 1):
        rows = slice(start, start + batch)
        part = send(ids[rows], adapter.device)  # (b, T)
        if late and holds_inputs(adapter, part.numel(), scan.limits.budget):
            parts.observe(late_pass.add(part))  # (b, T)
        else:
            weight = None if weights is None else send(weights[rows], adapter.device)  # (b, T)
            if late:
                parts.observe(mass := mass_of(adapter, part))  # (b, T)
                weight = _late_weight(mass, scan)  # (b, T)
            _add(adapter, part, norms, weight, relative)
        parts.keep(number, norms.tensors)
    return norms.norms(scan.workers)


def weighs_late(arm: str | None, sink: SinkSettings) -> bool:
    """Whether the row weights of a noisy sequence are known after its own pass.

    A policy that compares the levels of a window needs all of them, and a batch of sequences may not hold them all:
    then a pass of its own measures the mass first.
    """
    return arm is not None and needs_sinks(arm, sink) and arm.startswith("masked") and sink.policy == "all"


def holds_inputs(adapter: Adapter, tokens: int, budget: int, itemsize: int | None = None) -> bool:
    """Whether inputs wait for their row weights: where they fit the budget, and no block sorts tokens to experts."""
    mixed = any(block.mixture for block in adapter.blocks)
    return not mixed and late_input_bytes(adapter, tokens, itemsize) <= budget


def late_input_bytes(adapter: Adapter, tokens: int, itemsize: int | None = None) -> int:
    """Bytes held for the noisy sink arm until its row weights are known; `itemsize` of a hidden state's numbers."""
    hidden, size = adapter.hidden_size, itemsize or adapter.dtype.itemsize
    numbers, share = 0.0, 1 / SINGLE + (1 - 1 / SINGLE) / GROUP  # groups per row
    for block in adapter.blocks[:-1]:
        widths = {name: block[roles[0]].in_features for name, roles in block.readers.items()}
        mixed = widths.pop("mixed", 0)
        numbers += size * (hidden + mixed) + 4 * sum(widths.values()) * share
    return int(tokens * numbers)


def _late_weight(mass: torch.Tensor, scan: Scan) -> torch.Tensor:
    """Row weights (b, T) of noisy sequences from their own mass (b, T)."""
    weight = use_weights(arm_weights(mass[:, None], "masked+sink", scan.sink)[:, 0], mass.shape, scan)  # (b, T)
    assert weight is not None, "weights in, weights out"
    return weight


def _linears(adapter: Adapter) -> dict:
    """(block, input) -> the first linear that reads it."""
    return {(block.index, name): block[roles[0]] for block in adapter.blocks for name, roles in block.readers.items()}


def _norms(adapter: Adapter, relative: bool) -> dict:
    """(block, input, without an expert's number) -> the norm whose input is the stream that its reader writes to."""
    blocks = adapter.blocks if relative else []
    streams = [(block, name, role) for block in blocks for name, role in STREAM.items() if role in block.module.roles]
    return {(block.index, name): block.module.part(role) for block, name, role in streams}


def _add(adapter: Adapter, ids: torch.Tensor, norms: InputNorms, weight, relative: bool) -> None:
    """One forward pass over (b, T) ids whose row weights are known."""
    scales: dict[InputKey, torch.Tensor] = {}
    tokens: dict[InputKey, torch.Tensor] = {}  # (m,) of each input of an expert

    def visit(key: InputKey, x: torch.Tensor) -> None:
        scale = scales.get((key[0], role_and_part(key[1])[0]))  # (b, T)
        omega = weight if scale is None else scale if weight is None else scale * weight  # (b, T)
        if (seen := tokens.pop(key, None)) is None:
            norms.add(key, x, omega)
        else:
            norms.add(key, x, None if omega is None else omega.flatten()[seen], seen // ids.shape[1])

    def scale_rows(key: InputKey, x: torch.Tensor) -> None:
        scales[key] = relative_weight(x, None)  # (b, T)

    streams, linears = watch_inputs(_norms(adapter, relative), scale_rows), watch_inputs(_linears(adapter), visit)
    with streams, linears, watch_tokens(adapter.blocks, tokens.__setitem__):
        encode_rows(adapter.model, ids)


@dataclass(frozen=True)
class _Held:
    """One block's inputs, held until the row weights are known.

    In `order` the first T // `SINGLE` rows are groups of their own, then `GROUP` neighbours each are one.
    """

    x: torch.Tensor  # (b, T, C) the block's input
    mixed: torch.Tensor  # (b, T, H*D) what its attention output reads; H is 0 without attention
    order: torch.Tensor  # (b, T) int64 rows
    sums: dict[str, torch.Tensor]  # input -> (b, G, C) sums of squares over groups

    @classmethod
    def empty(cls, block: BlockView, shape: torch.Size, adapter: Adapter) -> "_Held":
        """Buffers for ids of a (b, T) shape, reused by all batches: fresh ones would fragment the heap."""
        widths = {name: block[roles[0]].in_features for name, roles in block.readers.items()}
        dtype, device = adapter.dtype, adapter.device
        x = torch.empty(*shape, adapter.hidden_size, dtype=dtype, device=device)  # (b, T, C)
        mixed = torch.empty(*shape, widths.pop("mixed", 0), dtype=dtype, device=device)  # (b, T, H*D)
        order = torch.empty(shape, dtype=torch.int64, device=device)  # (b, T)
        single, groups = _groups(shape[1])
        sums = {n: torch.empty(shape[0], single + groups, c, device=device) for n, c in widths.items()}
        return cls(x, mixed, order, sums)  # sums: (b, G, C)

    def first(self, count: int) -> "_Held":
        """The buffers of the first `count` sequences."""
        sums = {name: value[:count] for name, value in self.sums.items()}
        return _Held(self.x[:count], self.mixed[:count], self.order[:count], sums)

    def fill(self, inputs: Inputs, x: torch.Tensor, mass: torch.Tensor | None, relative: bool) -> None:
        """Hold a block's inputs, with the attention mass (b, T) so far; None before the first attention."""
        self.x.copy_(x)
        if "mixed" in inputs.read:
            self.mixed.copy_(inputs.read["mixed"])
        # sorted by mass, so that rows that may weigh less than 1 share groups
        ranks = torch.arange(x.shape[1], device=x.device) if mass is None else mass.argsort(dim=1, descending=True)
        self.order.copy_(ranks)  # (T,) or (b, T)
        for name, sums in self.sums.items():
            _grouped_squares(inputs.read[name], self.order, inputs.weight(name, None, relative), sums)


def _groups(length: int) -> tuple[int, int]:
    """Rows that are groups of their own, and the number of other groups, of `length` rows."""
    single = length // SINGLE
    return single, -(-(length - single) // GROUP)


class _LatePass:
    """Forward passes over noisy sequences whose row weights come from the pass itself; they add rows to `norms`."""

    def __init__(self, scan: Scan, norms: InputNorms, relative: bool):
        self._scan, self._adapter, self._norms, self._relative = scan, scan.adapter, norms, relative
        self._buffers: list[_Held] = []

    def add(self, ids: torch.Tensor) -> torch.Tensor:
        """Add the rows of (b, T) ids; their attention mass (b, T)."""
        adapter, last = self._adapter, self._adapter.blocks[-1]
        self._buffers = self._buffers or [_Held.empty(block, ids.shape, adapter) for block in adapter.blocks[:-1]]
        held = [buffers.first(len(ids)) for buffers in self._buffers]
        with MassMeter().on(adapter.cores) as meter:
            inputs = self._run(ids, held, meter)
            mass = meter.take()  # (b, T)
        weight = _late_weight(mass, self._scan)  # (b, T)
        for name, value in inputs.read.items():
            self._norms.add((last.index, name), value, inputs.weight(name, weight, self._relative))
        grouped = [_by_group(weight, each.order) for each in held]  # ((b, G), (b, G)) each
        # one device sync for all blocks' groups, not one per sequence and block
        apart = [mixed for _, mixed in grouped]  # (b, G) each
        mixed: Iterable[torch.Tensor] = torch.stack(apart).cpu() if apart else []  # (blocks, b, G)
        for block, each, (squared, _), groups in zip(adapter.blocks, held, grouped, mixed):
            self._count(block, each, weight, squared, groups)
        return mass

    def _run(self, ids: torch.Tensor, held: list[_Held], meter: MassMeter) -> Inputs:
        """Fill the buffers of all blocks but the last, whose inputs are returned."""
        x = self._adapter.model.embedding(ids)  # (b, T, C)
        context = self._adapter.context(ids.shape)
        for block, buffers in zip(self._adapter.blocks, held):
            inputs = block_inputs(block, x, context)
            buffers.fill(inputs, x, meter.so_far, self._relative)
            x = block_output(block, inputs)  # (b, T, C)
            del inputs  # or they would be in memory beside the next block's
        return block_inputs(self._adapter.blocks[-1], x, context)

    def _count(
        self, block: BlockView, held: _Held, weight: torch.Tensor, squared: torch.Tensor, mixed: torch.Tensor
    ) -> None:
        """Add a block's rows: whole groups where their rows weigh the same, else row by row.

        Args:
            weight: (b, T). squared: (b, G) mean ω² and mixed: (b, G) bool on the host, of `_by_group`.
        """
        scale = relative_weight(held.x, weight) if self._relative else weight  # (b, T)
        if "mixed" in block.readers:
            self._norms.add((block.index, "mixed"), held.mixed, scale)
        whole = squared * send(~mixed, squared.device)  # (b, G)
        squares = {name: torch.bmm(whole[:, None], sums)[:, 0] for name, sums in held.sums.items()}  # (b, C)
        single, _ = _groups(held.order.shape[1])
        for index, groups in enumerate(mixed):
            others = held.order[index, single:]  # (T - single,)
            places = groups[single:].repeat_interleave(GROUP)[: len(others)].nonzero()[:, 0]  # (r,), on the host
            if not len(places):
                continue
            rows = others[send(places, others.device)]  # (r,)
            inputs = inputs_of_rows(block, held.x[index, rows][None], held.mixed[index, rows][None])
            part = weight[index, rows][None]  # (1, r)
            for name in squares:
                part_weight = inputs.weight(name, part, self._relative)  # (1, r)
                squares[name][index] += squared_norms(inputs.read[name], part_weight)[0]  # (C,)
        for name, value in squares.items():
            self._norms.add_squares((block.index, name), value)


def _grouped_squares(x: torch.Tensor, order: torch.Tensor, weight: torch.Tensor | None, sums: torch.Tensor) -> None:
    """Sums of squares over groups of rows: x (b, T, C), order and weight (b, T), into sums (b, G, C) fp32.

    Gathering groups member by member takes a third of the time of squaring all rows and scattering the sums.
    """
    single, _ = _groups(order.shape[1])
    for index, ranks in enumerate(order):
        members = [ranks[:single]] + [ranks[single + member :: GROUP] for member in range(GROUP)]
        for member, rows in enumerate(members):  # the last group may be one row short
            part = x[index].index_select(0, rows).float()  # (g, C)
            if weight is not None:
                part = part * weight[index, rows, None]  # (g, C)
            total = sums[index, :single] if member == 0 else sums[index, single : single + len(rows)]  # (g, C)
            torch.mul(part, part, out=total) if member < 2 else total.addcmul_(part, part)


def _by_group(weight: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ω² of every group, and whether its weights differ: (b, T) each -> (b, G) each."""
    ranked, (single, _) = weight.gather(1, order), _groups(order.shape[1])  # (b, T)
    alone, rest = ranked[:, :single], ranked[:, single:]
    missing = -rest.shape[1] % GROUP  # rows that the last group lacks: its last weight fills them
    rest = torch.cat((rest, rest[:, -1:].expand(-1, missing)), dim=1).unflatten(1, (-1, GROUP))  # (b, g, GROUP)
    mixed = rest.amax(2) - rest.amin(2) > SAME  # (b, g)
    squared = torch.cat((alone.square(), rest.square().mean(2)), dim=1)  # (b, G)
    return squared, torch.cat((torch.zeros_like(alone, dtype=torch.bool), mixed), dim=1)
