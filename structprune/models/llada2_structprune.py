"""LLaDA2: a mixture of experts trained as a block diffusion LM, under the state-dict keys of `LLaDA2MoeModelLM`.

Copied next to every LLaDA2 checkpoint that structprune writes, beside the files that it imports from.
Shapes: n tokens, k experts of a token, E experts in G groups, C features, H query and K key/value heads of size D.
Papers: LLaDA2.0 arXiv 2512.15745; groups and biases of experts DeepSeek-V3 arXiv 2412.19437.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .blockwise_structprune import BlockDiffusion, BlockSampling
from .configuration_structprune import StructpruneDreamConfig, layer_width
from .experts_structprune import ExpertBlock

# transformers copies only the files that this one names, not those that they name
from .generation_structprune import LLaDASampling  # noqa: F401
from .layers_structprune import Layout  # noqa: F401
from .modeling_structprune import DecoderLM
from .rotary_structprune import positions_of, rotary_tables
from .sampling_structprune import gumbel_choice  # noqa: F401

PROJECTIONS = ("query", "key", "value")  # roles of what is one weight in the family's own layout
TOP_OF_GROUP = 2  # experts by which a group is chosen


class StructpruneLLaDA2Config(StructpruneDreamConfig):
    """LLaDA2's key names; `per_layer_config` may name `moe_intermediate_size`, `num_experts` and
    `shared_intermediate_size` too.

    A layer with 0 `num_experts` has a plain MLP of `moe_intermediate_size` channels. The family's own keys say so of
    the first layers (`first_k_dense_replace`, `intermediate_size`), and count shared experts (`num_shared_experts`).
    `block_size`: tokens of a block, 32 where config.json does not say. `rotary_size`: features of a head that turn.

    Raises:
        ValueError: groups that experts do not fill evenly, or of which a token gets too few experts.
    """

    model_type = "structprune_llada2"
    qkv_bias, qk_norm, reads_head_dim = False, True, True
    width_names = (
        "num_attention_heads", "num_key_value_heads", "moe_intermediate_size", "num_experts",
        "shared_intermediate_size",
    )  # fmt: skip
    layout_keys = ("intermediate_size", "first_k_dense_replace", "num_shared_experts")  # type: ignore[assignment]

    def __init__(
        self, moe_intermediate_size=512, num_experts=256, num_experts_per_tok=8, num_shared_experts=0,
        shared_intermediate_size=None, first_k_dense_replace=0, intermediate_size=None, n_group=8, topk_group=4,
        routed_scaling_factor=2.5, partial_rotary_factor=0.5, block_size=None, rope_theta=10000.0, rms_norm_eps=1e-5,
        max_position_embeddings=16384, mask_token_id=156895, num_hidden_layers=20, **kwargs,
    ):  # fmt: skip
        first_k_dense_replace, num_shared_experts = first_k_dense_replace or 0, num_shared_experts or 0
        block_size = 32 if block_size is None else block_size
        check_counts(first_k_dense_replace=first_k_dense_replace, num_shared_experts=num_shared_experts)
        check_counts(1, block_size=block_size, n_group=n_group, topk_group=topk_group)
        if first_k_dense_replace:
            check_counts(1, intermediate_size=intermediate_size)
        if shared_intermediate_size is None:
            shared_intermediate_size = num_shared_experts * moe_intermediate_size
        layers = {str(int(index)): widths for index, widths in (kwargs.pop("per_layer_config", None) or {}).items()}
        plain = {"moe_intermediate_size": intermediate_size, "num_experts": 0, "shared_intermediate_size": 0}
        for index in map(str, range(min(first_k_dense_replace, num_hidden_layers))):
            layers[index] = plain | layers.get(index, {})
        if layers:
            kwargs["per_layer_config"] = layers
        self.moe_intermediate_size, self.num_experts = moe_intermediate_size, num_experts
        self.shared_intermediate_size, self.num_experts_per_tok = shared_intermediate_size, num_experts_per_tok
        self.n_group, self.topk_group = n_group, topk_group
        self.partial_rotary_factor, self.block_size = partial_rotary_factor, block_size
        self.routed_scaling_factor = routed_scaling_factor
        if type(routed_scaling_factor) not in (int, float) or not 0 < routed_scaling_factor < 1e6:
            raise ValueError(f"routed_scaling_factor = {routed_scaling_factor!r}")
        for experts in {num_experts, *(widths.get("num_experts", 0) for widths in layers.values())} - {0}:
            check_groups(experts, num_experts_per_tok, n_group, topk_group)
        super().__init__(
            intermediate_size=intermediate_size or moe_intermediate_size, num_hidden_layers=num_hidden_layers,
            rope_theta=rope_theta, rms_norm_eps=rms_norm_eps, max_position_embeddings=max_position_embeddings,
            mask_token_id=mask_token_id, **kwargs,
        )  # fmt: skip
        size = self.head_dim * partial_rotary_factor
        if int(size) < 2 or int(size) % 2 or size > self.head_dim:
            raise ValueError(f"partial_rotary_factor = {partial_rotary_factor} of heads of {self.head_dim}")

    @property
    def rotary_size(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def _tied(self, values: dict) -> bool:
        return bool(values.pop("tie_word_embeddings", False))

    def _widths(self) -> list[list[int]]:
        """Of every layer, by `width_names`."""
        layers = range(self.num_hidden_layers)
        return [[layer_width(self, index, key) for key in self.width_names] for index in layers]

    def layout_obstacle(self):
        """Why the family's own keys cannot say how wide the layers are; None: they can."""
        widths = self._widths()
        leading = next((index for index, width in enumerate(widths) if width[3]), len(widths))
        plain, mixtures = widths[:leading], widths[leading:]
        heads = {tuple(width[:2]) for width in widths}
        if max(len(heads), len(set(map(tuple, plain))), len(set(map(tuple, mixtures)))) > 1:
            return "its blocks differ in width (use allocation uniform, protect no block)"
        if mixtures and mixtures[0][4] % mixtures[0][2]:
            return f"its shared experts keep {mixtures[0][4]} channels, no multiple of the {mixtures[0][2]} of others"
        return None

    def in_own_layout(self, values: dict) -> dict:
        widths = self._widths()
        plain = [width[2] for width in widths if not width[3]]
        mixture = next((width for width in widths if width[3]), None)
        own: dict[str, Any] = {"first_k_dense_replace": len(plain), "tie_word_embeddings": self.tie_word_embeddings}
        if plain:
            own["intermediate_size"] = plain[0]
        if mixture:
            _, _, channels, experts, shared = mixture
            own |= {"moe_intermediate_size": channels, "num_experts": experts}
            own["num_shared_experts"] = shared // channels or None
        absent = ("shared_intermediate_size", "per_layer_config")
        return {key: value for key, value in values.items() if key not in absent} | own


def check_counts(least: int = 0, **counts) -> None:
    """Raise ValueError for a value that is no whole number from `least` on, by its key."""
    for key, value in counts.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{key} = {value!r} is not a whole number from {least}")


def check_groups(experts: int, top_k: int, groups: int, top_groups: int) -> None:
    """Raise ValueError unless E experts fill their groups evenly, and enough are open to a token."""
    if top_groups > groups:
        raise ValueError(f"topk_group = {top_groups} of n_group = {groups}")
    if experts % groups or experts // groups < least_of_group(top_k, top_groups):
        choice = f"{top_k} of a token from {top_groups} groups"
        raise ValueError(f"num_experts = {experts} in n_group = {groups}, {choice}")


def least_of_group(top_k: int, top_groups: int) -> int:
    """The fewest experts that a group can have: so many choose it, and all open groups together fill a token's k."""
    return max(TOP_OF_GROUP, -(-top_k // top_groups))


class GroupedRouter(nn.Module):
    """Sigmoids of all experts, of which the largest k in the best groups count, in shares of a fixed sum.

    `expert_bias` (E,) is added for the choice alone. A group is as good as the sum of its two largest biased scores.
    """

    frozen = ("expert_bias",)  # no gradient reaches it

    def __init__(self, size: int, experts: int, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size).normal_(std=config.initializer_range))
        # no buffer, because weights that visit a device are parameters
        self.expert_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)
        self.top_k, self.groups, self.top_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.least = self.groups * least_of_group(self.top_k, self.top_groups)  # experts that must stay
        self.scaling = config.routed_scaling_factor

    def forward(self, rows):  # (n, C) -> weights (n, k) fp32 and experts (n, k) int64, the likeliest first
        device = "cpu" if rows.is_meta else rows.device.type
        with torch.autocast(device, enabled=False):  # autocast would round both sides of the product again
            scores = F.linear(rows.float(), self.weight.float()).sigmoid()  # (n, E)
        grouped = (scores + self.expert_bias.float()).unflatten(-1, (self.groups, -1))  # (n, G, E/G)
        merit = grouped.topk(TOP_OF_GROUP, dim=-1).values.sum(-1)  # (n, G)
        best = merit.topk(self.top_groups, dim=-1, sorted=False).indices  # (n, top groups)
        closed = torch.ones_like(merit, dtype=torch.bool).scatter(-1, best, False)  # (n, G)
        chosen = (
            grouped.masked_fill(closed[..., None], -torch.inf).flatten(1).topk(self.top_k, dim=-1).indices
        )  # (n, k)
        weights = scores.gather(-1, chosen)  # (n, k)
        if self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # (n, k)
        return weights * self.scaling, chosen


class LLaDA2Block(ExpertBlock):
    router_class = GroupedRouter
    roles = {
        "attention_norm": "input_layernorm", "query": "attention.q_proj", "key": "attention.k_proj",
        "value": "attention.v_proj", "core": "attention.core", "attention_output": "attention.dense",
        "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
        "query_norm": "attention.query_layernorm", "key_norm": "attention.key_layernorm",
    }  # fmt: skip


class JoinedBlock(LLaDA2Block):
    """With queries, keys and values of one linear, as in the family's own files."""

    roles = {role: path for role, path in LLaDA2Block.roles.items() if role not in PROJECTIONS}

    def __init__(self, config, index: int):
        super().__init__(config, index)
        if self.has_attention:
            heads, kv_heads = (layer_width(config, index, key) for key in config.width_names[:2])
            self.sizes = [count * self.head_dim for count in (heads, kv_heads, kv_heads)]
            self.roles["projections"] = "attention.query_key_value"
            self.place("projections", nn.Linear(config.hidden_size, sum(self.sizes), bias=False))

    def project(self, h):
        return self.part("projections")(h).split(self.sizes, dim=-1)


class StructpruneLLaDA2(BlockDiffusion, BlockSampling, DecoderLM):  # type: ignore[misc]
    config_class = StructpruneLLaDA2Config
    block_class: Any = LLaDA2Block
    embedding_name = "word_embeddings"
    _no_split_modules = ["LLaDA2Block"]
    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}

    def rotary(self, length: int, device, attention_mask=None, position_ids=None):
        """As `DiffusionLM.rotary`, of the features of a head that turn."""
        positions = positions_of(length, device, attention_mask, position_ids)  # (B or 1, T)
        return rotary_tables(positions, self.config.rotary_size, self.config.rope_theta)


class JoinedLLaDA2(StructpruneLLaDA2):
    """As transformers loads the family's own layout; `structprune.load_model` has projections apart."""

    block_class = JoinedBlock
    _no_split_modules = ["JoinedBlock"]
