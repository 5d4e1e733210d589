"""The prunable units of a block: how they group into removal steps, and which weight slices belong to each."""

from dataclasses import dataclass

import torch

from structprune.models.adapter import CONSUMER, BlockView, ExpertWidths, UnitKey
from structprune.models.experts_structprune import SHARED, role_of
from structprune.structured.paths import step_groups

Tensors = dict[tuple[str, str], torch.Tensor]  # (role, "weight" or "bias") -> a tensor of that parameter's shape


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one kind in one block, or in one of its experts."""

    block: BlockView
    kind: str  # "attention" or "channels"
    groups: list[list[int]]  # unit indices; a removal step takes one unit of every group (`paths.step_groups`)
    form: str  # the attention unit, `query_heads` or `kv_groups`
    part: str = ""  # of a mixture that the channels are of: the number of an expert, or `SHARED`

    @classmethod
    def of(cls, block: BlockView, kind: str, form: str, part: str = "") -> "Units":
        return cls(block, kind, block_groups(block, kind, form, part), form, part)

    @property
    def key(self) -> UnitKey:
        """Of an expert's channels the kind bears its number: "channels.3"."""
        return self.block.index, role_of(self.kind, self.part)

    @property
    def consumer(self) -> str:
        """The role of the linear that reads the units."""
        return role_of(CONSUMER[self.kind], self.part)

    @property
    def count(self) -> int:
        """U: units of this kind."""
        return sum(len(group) for group in self.groups)

    @property
    def weight(self) -> torch.Tensor:
        """(O, C) weight of the consumer, C = `count` * `width`."""
        return self.block[self.consumer].weight.detach()

    @property
    def width(self) -> int:
        """Columns of the consumer that read one unit."""
        return self.weight.shape[1] // self.count


def all_units(blocks: list[BlockView], form: str) -> list[Units]:
    """The units of every block, kind and part of a mixture, in the order of the forward pass."""
    units = []
    for block in blocks:
        units += [Units.of(block, kind, form) for kind in block.kinds]
        units += [Units.of(block, "channels", form, part) for part in block.module.parts]
    return units


def block_groups(block: BlockView, kind: str, form: str, part: str = "") -> list[list[int]]:
    """Units of one kind in step groups: one group per KV head for query heads of a GQA block, else one group.

    Channels are those of the MLP, or of one part of a mixture.
    """
    widths = block.widths
    if part == SHARED and isinstance(widths, ExpertWidths):
        return step_groups(widths.shared, 1)
    if kind == "channels":
        return step_groups(widths.channels, 1)
    if form == "kv_groups":
        return step_groups(widths.kv_heads, 1)
    return step_groups(widths.query_heads, 1 if widths.query_heads == widths.kv_heads else widths.kv_heads)


def coupled_slices(units: Units, tensors: Tensors) -> list[torch.Tensor]:
    """Every weight slice that is removed with each unit, flattened: U units -> tensors (U, n_i).

    Args:
        tensors: what to slice, by role and name: parameters, or products of the same shapes.
    """
    widths = units.block.widths
    if units.kind == "channels":
        rows: tuple[str, ...] = (role_of("gate", units.part), role_of("up", units.part))
    elif units.form == "kv_groups" or widths.query_heads == widths.kv_heads:
        rows = ("query", "key", "value")
    else:
        rows = ("query",)
    parts = [tensors[key].reshape(units.count, -1) for key in tensors if key[0] in rows]  # (U, n)
    return [*parts, tensors[units.consumer, "weight"].T.reshape(units.count, -1)]


def block_tensors(block: BlockView) -> Tensors:
    """(role, name) -> parameter of the linears of a block."""
    return {(role, name): value for role in block.names for name, value in block[role].named_parameters()}
