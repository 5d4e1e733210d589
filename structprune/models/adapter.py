"""A uniform view of a model of any family: its blocks, their projections and widths."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from structprune.models.configuration_structprune import layer_width
from structprune.models.experts_structprune import SHARED, ExpertBlock, role_and_part, role_of
from structprune.models.families import ROLES, Family, family_of
from structprune.models.layers_structprune import AttentionContext, Block
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device, compute_dtype

CONSUMER = {"attention": "attention_output", "channels": "down"}  # kind of unit -> role of the linear that reads it
CONSUMERS = tuple(CONSUMER.values())
UNIT_KINDS = tuple(CONSUMER)
EXPERTS = "experts"  # the kind of whole experts, which go before the other kinds are shared out
UnitKey = tuple[int, str]  # (block index, kind of unit)
READERS = {  # a block's activation -> roles of the linears that read it, which share its statistics
    "attention_input": ("query", "key", "value"),
    "mixed": ("attention_output",),
    "mlp_input": ("gate", "up"),
    "activated": ("down",),
}
BLOCK_LISTS = ("layer_types", "moe_layer_freq")  # keys with an entry for each block
STREAM_READERS = {"attention": "attention_input", "channels": "mlp_input"}  # kind of unit -> the normed residual stream


@dataclass(frozen=True)
class Widths:
    """The prunable sizes of one block: query heads H, key/value heads K, MLP channels M; 0 of what it lacks."""

    query_heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class ExpertWidths(Widths):
    """Of a block whose MLP may be a mixture of experts: then `channels` are those of every expert.

    `experts` is 0 where the MLP is a plain one. `shared`: channels of what all tokens go through, 0 without it.
    """

    experts: int
    shared: int


@dataclass(frozen=True)
class BlockView:
    """One block: its module, widths, and its linears by role (`view["down"]`, `view["down.3"]` of the fourth expert).

    A block may lack attention, MLP or both: `kinds`, `names`, `consumers` and `readers` hold what it has.
    """

    index: int
    name: str
    module: Block
    widths: Widths
    head_dim: int
    names: dict[str, str]  # role -> full module name; at most the seven of `ROLES`, of experts those of each

    def __getitem__(self, role: str) -> nn.Linear:
        return cast(nn.Linear, self.module.part(role))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of units that one linear reads, in the order of the forward pass."""
        return tuple(kind for kind, role in CONSUMER.items() if role in self.names)

    @property
    def cut_kinds(self) -> tuple[str, ...]:
        """Kinds of units that can go, those of experts included."""
        return (*self.kinds, "channels") if self.mixture else self.kinds

    @property
    def expert_parts(self) -> tuple[str, ...]:
        """The numbers of the experts, as roles bear them; none of a plain MLP."""
        return tuple(str(number) for number in range(self.mixture.experts)) if self.mixture else ()

    @property
    def consumers(self) -> tuple[str, ...]:
        """Roles of the consumers, in the order of the forward pass."""
        return tuple(CONSUMER[kind] for kind in self.kinds)

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """The block's inputs, in the order of the forward pass -> roles of the linears that read them.

        Those of an expert bear its number: "mlp_input.3", "activated.3".
        """
        readers = {name: roles for name, roles in READERS.items() if roles[0] in self.names}
        for part in self.module.parts:
            own = {role_of(name, part): READERS[name] for name in ("mlp_input", "activated")}
            readers |= {name: tuple(role_of(role, part) for role in roles) for name, roles in own.items()}
        return readers

    @property
    def mixture(self) -> ExpertBlock | None:
        """The module, where its MLP is a mixture of experts."""
        return cast(ExpertBlock, self.module) if self.module.parts else None

    def half(self, kind: str) -> dict[str, nn.Linear]:
        """Role -> the linears of a kind's half of the block: those that read the residual stream, and the consumer.

        Of `EXPERTS` the down projections alone, which a refit changes.
        """
        if kind == EXPERTS:
            return {role: self[role] for role in (role_of("down", part) for part in self.module.parts)}
        return {role: self[role] for role in (*self.readers[STREAM_READERS[kind]], CONSUMER[kind])}

    @property
    def core(self) -> nn.Module:
        """The attention core, of a block with attention."""
        return self.module.part("core")

    @property
    def mlp_start(self) -> str | None:
        """The first input that reads the stream behind attention; None without an MLP."""
        return next((name for name in self.readers if role_and_part(name)[0] == "mlp_input"), None)

    @property
    def mlp_end(self) -> str | None:
        """The last input; None without an MLP."""
        return list(self.readers)[-1] if self.mlp_start else None

    def tokens(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """Which tokens of the stream before the MLP (b, T, C) an expert sees, for one of its inputs: (m,).

        None of an input of all tokens.
        """
        part = role_and_part(name)[1]
        return self.mixture.seen(x, part) if self.mixture and part not in ("", SHARED) else None

    def read(
        self, name: str, x: torch.Tensor, context: AttentionContext | None = None, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One input of the block's linears, a key of `readers`: (b, T, .), from the stream before their half (b, T, C).

        Args:
            context: for `mixed` only.
            tokens: some of the b * T, (m,), for (m, .); for the MLP only.
        """
        base, part = role_and_part(name)
        if self.mixture and part:
            own = x if tokens is None else x.flatten(0, -2)[tokens]  # (b, T, C) or (m, C)
            rows = self.module.part("mlp_norm")(own)  # (b, T, C) or (m, C)
            return self.mixture.gated(part, rows) if base == "activated" else rows
        if name == "mixed":
            assert context is not None, "attention needs positions and a mask"
            return self.module.mix(x, *context)
        if name == "activated":
            return self.module.activate(x)
        return self.module.part("attention_norm" if name == "attention_input" else "mlp_norm")(x)

    def consumed(self, kind: str, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """What the consumer of a kind reads, (b, T, units), on the stream before its half of the block (b, T, C)."""
        return self.read("mixed" if kind == "attention" else "activated", x, context)


class Adapter:
    """Uniform access to a structprune model.

    Raises:
        TypeError: the model is not one that `structprune.load_model` returns.
    """

    def __init__(self, model: DiffusionLM):
        self.model = model
        self.family: Family = family_of(model.config)
        self.head_dim: int = model.config.head_dim
        self.blocks: list[BlockView] = []
        for index, module in enumerate(model.blocks):
            prefix, widths = f"{self.family.blocks}.{index}", block_widths(model.config, self.family, index)
            linears = [role for role in module.roles if role_and_part(role)[0] in ROLES]
            linears.sort(key=lambda role: ROLES.index(role_and_part(role)[0]))
            names = {role: f"{prefix}.{module.roles[role]}" for role in linears}
            self.blocks.append(BlockView(index, prefix, module, widths, self.head_dim, names))

    @property
    def attending(self) -> list[BlockView]:
        """The blocks that have attention, at least one."""
        return [block for block in self.blocks if "attention" in block.kinds]

    @property
    def cores(self) -> list[nn.Module]:
        """The attention cores, in the order of the forward pass."""
        return [block.core for block in self.attending]

    @property
    def hidden_size(self) -> int:
        return getattr(self.model.config, self.family.keys["hidden"])

    @property
    def vocabulary(self) -> int:
        return getattr(self.model.config, self.family.keys["vocabulary"])

    @property
    def positions(self) -> int:
        """The longest sequence that the model takes, in tokens."""
        return getattr(self.model.config, self.family.keys["positions"])

    @property
    def mask_id(self) -> int:
        return self.model.config.mask_token_id

    def context(self, shape: torch.Size) -> AttentionContext:
        """Positions of the tokens of rows of a pass (b, S), and which of them they see, by the model's layout."""
        return self.model.layout.context(self.model, shape, self.device)

    @property
    def device(self) -> torch.device:
        return compute_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return compute_dtype(self.model)


def block_widths(config: Any, family: Family, index: int) -> Widths:
    """The widths that a config gives block `index`."""
    kind = ExpertWidths if "experts" in family.width_keys else Widths
    return kind(**{role: layer_width(config, index, key) for role, key in family.width_keys.items()})


def set_depth(values: dict, family: Family, depth: int) -> dict:
    """A copy of the config dictionary `values` for `depth` blocks, under every name that counts or lists them.

    The blocks are alike, so a list of their types loses its last ones.
    """
    values = values | {key: depth for key in (family.keys["depth"], "num_hidden_layers") if key in values}
    lists = {key: values[key] for key in BLOCK_LISTS if isinstance(values.get(key), list)}
    return values | {key: types[:depth] for key, types in lists.items()}


def set_widths(values: dict, family: Family, widths: list[Widths]) -> dict:
    """A copy of the config dictionary `values` for blocks of `widths`: global where all agree, else per layer.

    A global width is never 0, which engines would divide by; blocks that lack something say so themselves. Global heads
    are those of one block, so that query heads are a multiple of key/value heads.
    """
    roles = {*family.keys.values(), *family.width_keys.values()}
    other_names = set(family.config_class.attribute_map) - roles  # of the same values, which would contradict them
    values = {key: value for key, value in values.items() if key not in (*other_names, "per_layer_config")}
    values = set_depth(values, family, len(widths))
    for role, key in family.width_keys.items():
        sizes = [size for block in widths if (size := getattr(block, role))]
        # the commonest width, so that overrides stay few; 0 of what no block has
        values[key] = max(set(sizes), key=sizes.count) if sizes else 0
    pairs = [(block.query_heads, block.kv_heads) for block in widths if block.query_heads]
    heads = max(set(pairs), key=pairs.count) if pairs else (0, 0)
    values |= {family.width_keys[role]: count for role, count in zip(("query_heads", "kv_heads"), heads)}
    overrides: dict[str, dict[str, int]] = {}
    for index, block in enumerate(widths):
        sizes_here = {key: getattr(block, role) for role, key in family.width_keys.items()}
        if override := {key: size for key, size in sizes_here.items() if size != values[key]}:
            overrides[str(index)] = override
    return values | {"per_layer_config": overrides} if overrides else values
