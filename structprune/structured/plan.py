"""A plan: the units that every block keeps, as a JSON file that can be saved, read, edited and applied."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from structprune.errors import UserError
from structprune.files import whole_file
from structprune.models.adapter import EXPERTS, UNIT_KINDS, Adapter, BlockView, ExpertWidths, UnitKey, Widths
from structprune.models.checkpoint_files import read_json
from structprune.models.experts_structprune import SHARED
from structprune.structured.allocate import Counts
from structprune.structured.paths import RemovalPath

FORMAT = 1
OPTIONAL = (EXPERTS, SHARED)  # lists of mixtures alone


@dataclass(frozen=True)
class BlockPlan:
    """Kept indices of one block, sorted; without heads its attention goes, without channels its MLP.

    Of a mixture, `experts` are those that stay, and channel c of expert e has number e M + c, M channels each; `shared`
    are channels of what all tokens go through.
    """

    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]
    experts: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()

    @property
    def widths(self) -> Widths:
        """The numbers of units; of a mixture see `left_of`."""
        return Widths(len(self.query_heads), len(self.kv_heads), len(self.channels))

    def left_of(self, before: Widths) -> Widths:
        """What is left of a block of these widths."""
        if not isinstance(before, ExpertWidths):
            return self.widths
        heads, kv_heads, channels = len(self.query_heads), len(self.kv_heads), len(self.channels)
        each = channels // max(1, len(self.experts))
        return ExpertWidths(heads, kv_heads, each, experts=len(self.experts), shared=len(self.shared))

    def of_expert(self, expert: int, size: int) -> tuple[int, ...]:
        """The kept channels of an expert of `size`, by their numbers in it."""
        own = range(expert * size, (expert + 1) * size)
        return tuple(channel - own.start for channel in self.channels if channel in own)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of units that stay, in part or whole."""
        units = {"attention": self.query_heads, "channels": self.channels}
        return tuple(kind for kind in UNIT_KINDS if units[kind])


@dataclass(frozen=True)
class Plan:
    """Kept units of every block of a model of `family`; `notes` tell its origin and are not used to apply it.

    A block of which nothing is kept is deleted, and those behind it move up.
    """

    family: str
    blocks: tuple[BlockPlan, ...]
    notes: dict = field(default_factory=dict)

    @property
    def remaining(self) -> tuple[int, ...]:
        """The dense model's index of every block of the pruned one."""
        return tuple(index for index, block in enumerate(self.blocks) if block.kinds)

    @property
    def experts(self) -> dict[int, tuple[int, ...]]:
        """Block -> the experts that it keeps; empty of a plain MLP."""
        return {index: block.experts for index, block in enumerate(self.blocks)}

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all."""
        path = Path(path)
        with whole_file(path) as draft:
            draft.write_text(self.to_json(), encoding="utf-8")
        return path

    def to_json(self) -> str:
        """One line per list, so that a person can edit it."""
        head = {"format": FORMAT, "family": self.family, "notes": self.notes}
        lines = [json.dumps(head, indent=1)[:-2] + ',\n "blocks": [']
        for index, block in enumerate(self.blocks):
            lists = {key: value for key, value in asdict(block).items() if key not in OPTIONAL or value}
            body = ",\n   ".join(f'"{key}": {json.dumps(list(value))}' for key, value in lists.items())
            lines.append("  {" + body + "}" + ("," if index + 1 < len(self.blocks) else ""))
        return "\n".join(lines) + "\n ]\n}\n"

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan.

        Raises:
            UserError: missing, not JSON, or not a plan.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no plan file at '{path}': give the plan.json of a pruned model")
        values = read_json(path, "mend it, or write the plan anew")
        if values.get("format") != FORMAT or not isinstance(values.get("blocks"), list):
            raise UserError(
                f"{path} is not a structprune plan of format {FORMAT}: give the plan.json of a pruned model"
            )
        blocks = []
        for index, entry in enumerate(values["blocks"]):
            lists = {}
            for key in BlockPlan.__dataclass_fields__:
                units = entry.get(key, [] if key in OPTIONAL else None) if isinstance(entry, dict) else None
                if not isinstance(units, list) or not all(type(unit) is int for unit in units):
                    raise UserError(f"{path}: block {index} has no list of integers '{key}': add it")
                lists[key] = tuple(units)
            blocks.append(BlockPlan(**lists))
        return cls(str(values.get("family")), tuple(blocks), values.get("notes") or {})

    def check(self, adapter: Adapter) -> None:
        """Raises UserError unless the plan fits the model: family, depth, and every kept index.

        Attention must stay in at least one block, and an MLP too.
        """
        remedy = "give a plan of this model"
        if self.family != adapter.family.name:
            raise UserError(
                f"the plan is for family '{self.family}', the model is of '{adapter.family.name}': {remedy}"
            )
        if len(self.blocks) != len(adapter.blocks):
            raise UserError(f"the plan has {len(self.blocks)} blocks, the model {len(adapter.blocks)}: {remedy}")
        for kept, block in zip(self.blocks, adapter.blocks):
            for key, units in asdict(kept).items():
                _check_indices(units, unit_count(block.widths, key), f"the plan's block {block.index}: {key}")
            _check_heads(kept, block.widths, block.index)
            if block.mixture:
                _check_mixture(kept, block, block.mixture.router)
        for kind, name in (("attention", "attention"), ("channels", "an MLP")):
            if not any(kind in kept.kinds for kept in self.blocks):
                raise UserError(f"the plan leaves no block with {name}: keep it in one block at least")


def unit_count(widths: Widths, key: str) -> int:
    """How many units a block has under a key of `BlockPlan`."""
    experts = getattr(widths, EXPERTS, 0)
    count = getattr(widths, key, 0)
    return count * max(1, experts) if key == "channels" else count


def _check_mixture(kept: BlockPlan, block: BlockView, router: Any) -> None:
    """Raise UserError where experts keep unequal numbers of channels, or a token has too few to choose from.

    Groups of experts, where the router has some, keep as many of each.
    """
    where = f"the plan's block {block.index}"
    if not kept.channels:
        return
    size = block.widths.channels
    counts = {expert: len(kept.of_expert(expert, size)) for expert in kept.experts}
    if len(set(counts.values())) != 1 or sum(counts.values()) != len(kept.channels):
        raise UserError(f"{where}: experts keep unequal numbers of channels, or channels of experts that go")
    if len(counts) < router.least:
        least = f"at least {router.least}" if router.least > router.top_k else "at least as many"
        raise UserError(f"{where} keeps {len(counts)} experts, of which a token gets {router.top_k}: keep {least}")
    size = len(block.expert_parts) // router.groups
    groups = {group: sum(expert // size == group for expert in kept.experts) for group in range(router.groups)}
    if len(set(groups.values())) != 1:
        raise UserError(f"{where}: groups of experts keep unequal numbers ({groups}): keep as many of each")


def _check_indices(units: tuple[int, ...], width: int, where: str) -> None:
    if not units:
        return
    if not width:
        raise UserError(f"{where} names {units[0]}, but that block of the model has none: give []")
    if list(units) != sorted(set(units)):
        raise UserError(f"{where} is not sorted and free of repeats: sort it, each index once")
    if units[0] < 0 or units[-1] >= width:
        wrong = units[0] if units[0] < 0 else units[-1]
        raise UserError(f"{where} names {wrong}, but the model has {width}: give indices from 0 to {width - 1}")


def _check_heads(kept: BlockPlan, widths: Widths, index: int) -> None:
    """Raise UserError where a query head loses its KV head, or KV heads keep unequal numbers of query heads."""
    if not kept.query_heads and not kept.kv_heads:
        return
    if not kept.query_heads or not kept.kv_heads:
        side, other = ("KV heads", "query heads") if kept.kv_heads else ("query heads", "KV heads")
        raise UserError(f"the plan's block {index} keeps {side} but no {other}: empty both lists, or neither")
    per = widths.query_heads // widths.kv_heads
    counts = {head: 0 for head in kept.kv_heads}
    for head in kept.query_heads:
        if head // per not in counts:
            raise UserError(f"the plan's block {index}: query head {head} stays but its KV head {head // per} goes")
        counts[head // per] += 1
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise UserError(f"the plan's block {index}: KV heads keep unequal numbers of query heads ({counts})")


def identity_plan(adapter: Adapter) -> Plan:
    """The plan that keeps everything."""
    widths = [block.widths for block in adapter.blocks]
    sizes = [[unit_count(each, key) for key in BlockPlan.__dataclass_fields__] for each in widths]
    return Plan(adapter.family.name, tuple(BlockPlan(*(tuple(range(size)) for size in each)) for each in sizes))


def make_plan(
    adapter: Adapter, paths: dict[UnitKey, RemovalPath], counts: Counts, form: str, notes: dict | None = None
) -> Plan:
    """The plan that removes `counts` steps of every path; blocks and kinds without counts keep everything."""
    blocks = list(identity_plan(adapter).blocks)
    for (index, kind), steps in counts.items():
        widths = adapter.blocks[index].widths
        units = set(paths[index, kind].removed(steps))
        if kind == "channels":
            channels = tuple(channel for channel in blocks[index].channels if channel not in units)
            blocks[index] = replace(blocks[index], channels=channels)
            continue
        if kind == EXPERTS:
            blocks[index] = _without_experts(blocks[index], units, widths.channels)
            continue
        if kind == SHARED:
            shared = tuple(channel for channel in blocks[index].shared if channel not in units)
            blocks[index] = replace(blocks[index], shared=shared)
            continue
        per = widths.query_heads // widths.kv_heads
        groups = per == 1 or form == "kv_groups"  # units are KV heads with all their query heads
        blocks[index] = replace(
            blocks[index],
            query_heads=tuple(h for h in range(widths.query_heads) if (h // per if groups else h) not in units),
            kv_heads=_kept_kv_heads(widths, units, groups),
        )
    return Plan(adapter.family.name, tuple(blocks), notes or {})


def _without_experts(kept: BlockPlan, experts: set[int], size: int) -> BlockPlan:
    """A block's plan without some experts, of `size` channels each."""
    channels = tuple(channel for channel in kept.channels if channel // size not in experts)
    return replace(kept, channels=channels, experts=tuple(each for each in kept.experts if each not in experts))


def _kept_kv_heads(widths: Widths, units: set[int], groups: bool) -> tuple[int, ...]:
    """KV heads that stay: those not among the removed `units` if these are KV groups, else all with a query head."""
    if groups:
        return tuple(head for head in range(widths.kv_heads) if head not in units)
    return tuple(range(widths.kv_heads)) if len(units) < widths.query_heads else ()
