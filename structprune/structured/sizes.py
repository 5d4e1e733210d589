"""How many parameters, MACs and units there are, from module shapes alone (meta tensors suffice)."""

from dataclasses import dataclass, replace

from structprune.models.adapter import (
    CONSUMER,
    EXPERTS,
    READERS,
    STREAM_READERS,
    UNIT_KINDS,
    Adapter,
    BlockView,
    ExpertWidths,
    UnitKey,
    Widths,
)
from structprune.models.experts_structprune import SHARED, role_and_part, role_of
from structprune.structured.units import block_groups, block_tensors

WIDE_STEPS = 16  # rounding to n needs an MLP of at least this many times n
ROUNDINGS = (128, 64, 32, 16, 8)


@dataclass(frozen=True)
class BlockSize:
    """One block's prunable parameters. The mappings have only the kinds of units that the block has."""

    index: int
    total: int  # weights and biases of the linears
    step: dict[str, int]  # kind -> parameters that one removal step takes
    steps: dict[str, int]  # kind -> number of steps; all of them take the whole attention or MLP
    whole: dict[str, int]  # kind -> parameters of the whole attention or MLP, keys and values of shared heads included
    experts: int = 0  # whole experts that go in any case
    shared: int = 0  # channels of what all tokens go through that go in any case
    gone: int = 0  # the parameters of both

    def removed(self, kind: str, steps: int) -> int:
        """Parameters that `steps` removal steps take."""
        return self.whole[kind] if steps == self.steps[kind] else steps * self.step[kind]


def block_size(block: BlockView, form: str, experts: int = 0, shared: int = 0) -> BlockSize:
    """Sizes of one block for the attention unit `form` (`query_heads` or `kv_groups`).

    Args:
        experts: so many experts of a mixture go whole; a step then takes one channel of each of the others.
        shared: so many channels go of what all its tokens go through.
    """
    groups = {kind: block_groups(block, kind, form) for kind in block.cut_kinds}
    steps = {kind: len(group[0]) for kind, group in groups.items()}
    step, whole, gone = {}, {}, 0
    own: dict[str, int] = {}
    tensors = block_tensors(block)
    for kind in block.kinds:
        readers = READERS[STREAM_READERS[kind]]
        # k and v of a KV group stay while any of its query heads does
        rows = ("query",) if kind == "attention" and len(groups[kind]) > 1 else readers
        cut = sum(value.numel() for (role, _), value in tensors.items() if role in rows)
        step[kind] = (cut + block[CONSUMER[kind]].weight.numel()) // steps[kind]
        whole[kind] = sum(value.numel() for (role, _), value in tensors.items() if role in (*readers, CONSUMER[kind]))
    if block.mixture:
        parts = dict.fromkeys(block.module.parts, 0)  # part -> its parameters
        for (role, _), value in tensors.items():
            if part := role_and_part(role)[1]:
                parts[part] += value.numel()
        common = shared * parts[SHARED] // block[role_of("down", SHARED)].in_features if SHARED in parts else 0
        gone, left = parts["0"] * experts + common, parts["0"] * (len(block.expert_parts) - experts)
        step["channels"], whole["channels"] = left // steps["channels"], sum(parts.values()) - gone
        own = {"experts": experts, "shared": shared if SHARED in parts else 0}
    return BlockSize(block.index, sum(whole.values()) + gone, step, steps, whole, gone=gone, **own)


def widths_after(widths: Widths, counts: dict[UnitKey, int], index: int, form: str) -> Widths:
    """The widths of block `index` after its removal steps in `counts`; unchanged where it has none."""
    steps, channels = (counts.get((index, kind), 0) for kind in UNIT_KINDS)
    widths = replace(widths, channels=widths.channels - channels)
    if isinstance(widths, ExpertWidths):
        experts, shared = (counts.get((index, kind), 0) for kind in (EXPERTS, SHARED))
        widths = replace(widths, experts=widths.experts - experts, shared=widths.shared - shared)
    if not steps:
        return widths
    per = widths.query_heads // widths.kv_heads  # query heads per KV head
    if per == 1 or form == "kv_groups":
        query_heads, kv_heads = widths.query_heads - per * steps, widths.kv_heads - steps
    else:
        query_heads, kv_heads = widths.query_heads - widths.kv_heads * steps, widths.kv_heads
    return replace(widths, query_heads=query_heads, kv_heads=kv_heads)


def rounding(width: int, multiple: str | int) -> int:
    """The multiple that remaining MLP widths have: the one given, or for "auto" 128, less where the MLP is narrow."""
    if multiple != "auto":
        return int(multiple)
    return next((n for n in ROUNDINGS if width % n == 0 and width >= WIDE_STEPS * n), 1)


def forward_macs(adapter: Adapter, length: int) -> int:
    """Multiply-accumulates of one forward pass over one sequence of `length` tokens, head and attention included."""
    linears = sum(active_weights(block) for block in adapter.blocks)
    head = adapter.vocabulary * adapter.hidden_size
    scores = sum(2 * block.widths.query_heads * adapter.head_dim * length for block in adapter.blocks)
    return length * (linears + head + scores)


def active_weights(block: BlockView) -> int:
    """Weights of a block's linears that a token goes through: of experts, those of as many as it gets."""
    return active_share(block, {role: block[role].weight.numel() for role in block.names})


def active_share(block: BlockView, sizes: dict[str, int]) -> int:
    """What a token goes through of numbers that belong to a block's linears, by role."""
    if block.mixture is None:
        return sum(sizes.values())
    own = sum(size for role, size in sizes.items() if role_and_part(role)[1] in block.expert_parts)
    return sum(sizes.values()) - own + own * block.mixture.top_k // block.mixture.experts
