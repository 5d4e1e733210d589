"""The layers of all families: norms, attention, and blocks that may differ in width.

Copied next to every checkpoint structprune writes: imports torch and two files beside it only.

Shapes: B batch, T sequence length, H query heads, K key/value heads, D head dim, C features.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_structprune import layer_width
from .rotary_structprune import rotate

ATTENTIONS = ("sdpa", "eager")  # values of `attn_implementation`, the default first
HEAD_NORMS = ("query_norm", "key_norm")  # roles of norms over the features of a head, which all heads share
ATTENTION = ("attention_norm", "query", "key", "value", *HEAD_NORMS, "core", "attention_output")  # roles of parts
MLP = ("mlp_norm", "gate", "up", "down")


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):  # (B, T, C) -> (B, T, C), normalised in fp32
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)  # (B, T, C)
        return self.weight * wide.to(x.dtype)


def check_attention(name) -> None:
    """Raise ValueError if `attn_implementation` is not one of `ATTENTIONS`; None is the default."""
    if name not in (None, *ATTENTIONS):
        raise ValueError(f"attn_implementation = {name!r} is not available for this model: use 'sdpa' or 'eager'")


def core_mask(attention_mask, shape, dtype):
    """What the attention core gets for an attention mask.

    Args:
        attention_mask: (B, T), true or 1 at real tokens; (B, 1, T, T) or (B, 1, 1, T), bool with true where a query may
            attend, or float that is added to the scores; B may be 1. None or "full", as in Dream's own code: no mask.
        shape: B and T.
        dtype: that a float mask is cast to.
    Returns:
        None, or bool or float (B, 1, 1 or T, T).
    Raises:
        ValueError: anything else.
    """
    if attention_mask is None or (isinstance(attention_mask, str) and attention_mask == "full"):
        return None
    batch, length = shape
    sizes = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else repr(attention_mask)[:40]
    if sizes in ((batch, length), (1, length)):
        return attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
    if sizes not in ((rows, 1, queries, length) for rows in (batch, 1) for queries in (length, 1)):
        shapes = f"({batch}, {length}), ({batch}, 1, {length}, {length}) or ({batch}, 1, 1, {length})"
        raise ValueError(f"attention_mask must be {shapes}, not {sizes}")
    if attention_mask.dtype == torch.bool:
        return attention_mask
    if not attention_mask.is_floating_point():
        raise ValueError(f"4-D attention_mask must be bool (true: attend) or float (added), not {attention_mask.dtype}")
    return attention_mask.to(dtype)


def plain_attention(query, key, value, mask=None):
    """Softmax attention by matrix products, as SDPA gives it: 3 x (B, H, T, D) -> (B, H, T, D)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (B, H, T, T)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    empty = scores.isneginf().all(-1, keepdim=True)  # (B, H, T, 1): queries that attend to nothing get zeros
    weights = scores.float().softmax(-1).masked_fill(empty, 0.0)  # (B, H, T, T)
    return weights.to(value.dtype) @ value


class AttentionContext(NamedTuple):
    """Positions of a pass's tokens and which of them they see: all that attention reads beside hidden states.

    Attributes:
        rotary: RoPE tables, 2 x (1 or B, 1, T, D); for some models also a factor of queries (1 or B, 1, T, 1).
        mask: as `core_mask` gives it, (1 or B, 1, 1 or T, T); None where every token sees every other.
    """

    rotary: Any
    mask: Any = None

    def of(self, queries: slice) -> "AttentionContext":
        """That of some of the T tokens, which see as much as before."""
        rotary = tuple(table[:, :, queries] for table in self.rotary)  # (1 or B, 1, n, .) each
        whole = self.mask is None or self.mask.shape[2] == 1
        return AttentionContext(rotary, self.mask if whole else self.mask[:, :, queries])  # (1 or B, 1, 1 or n, T)


class Layout:
    """How a noisy window and its clean text lie in a row of a pass, S tokens for T of the window: the noisy one alone.

    A model says which layout it needs (`DiffusionLM.layout`). Predictions are always of the first T tokens of a row.
    """

    copies, causal = 1, False  # S / T; whether clean tokens see none behind them, as in another use of the model

    def rows(self, noisy, clean):
        """Rows of a pass: two (..., T), whose leading sizes may broadcast -> (..., S)."""
        return noisy

    def spread(self, values, other):
        """What belongs to noisy tokens, by row, with `other` at all further ones: (..., T) -> (..., S)."""
        return values

    def windows(self, values):
        """What belongs to tokens of rows, by window: (..., S) -> S / T of (..., T), the noisy one first."""
        return values.tensor_split(self.copies, dim=-1)

    def context(self, model, shape, device) -> AttentionContext:
        """Positions of the tokens of rows of a (B, S) shape, and which of them they see."""
        return model.context(shape, device)


class AttentionCore(nn.Module):
    """Bidirectional softmax attention on post-RoPE queries and keys: the seam that statistics hook.

    `config` says which of `ATTENTIONS` computes it, also after `set_attn_implementation`; without it, SDPA does.
    """

    def __init__(self, config=None):
        super().__init__()
        self.config = config

    def forward(self, query, key, value, mask=None):  # (B, H, T, D), 2 x (B, K, T, D) -> (B, H, T, D)
        repeat = query.shape[1] // key.shape[1]
        if repeat > 1:
            key, value = (side.repeat_interleave(repeat, dim=1) for side in (key, value))  # 2 x (B, H, T, D)
        if getattr(self.config, "_attn_implementation", None) == "eager":
            return plain_attention(query, key, value, mask)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Block(nn.Module):
    """A pre-norm transformer block; `roles` places its parts under the family's names.

    A block may lack attention, MLP or both: then `roles` of the instance names none of its parts, and it adds nothing.
    `mix` and `activate` end where the consumers (attention output, down projection) begin: a refit can stand between.
    """

    roles: dict[str, str] = {}
    parts: tuple[str, ...] = ()  # of an MLP that is a mixture of experts
    has_attention = has_mlp = True

    def part(self, role: str) -> nn.Module:
        return self.get_submodule(self.roles[role])

    def place(self, role: str, module: nn.Module) -> None:
        *path, name = self.roles[role].split(".")
        parent = self
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = getattr(parent, step)
        parent.add_module(name, module)

    def build(self, config, size, widths, qkv_bias=False, bias=False):
        """Place the parts: `size` is C, `widths` are H, K and the MLP's channels; 0 for no attention or no MLP."""
        self.head_dim, (heads, kv_heads, channels) = config.head_dim, widths
        self.has_attention, self.has_mlp = heads > 0, channels > 0
        absent = (() if self.has_attention else ATTENTION) + (() if self.has_mlp else MLP)
        self.roles = {role: path for role, path in self.roles.items() if role not in absent}
        mixed, shared = heads * self.head_dim, kv_heads * self.head_dim
        attention_bias, mlp_bias = config.attention_output_bias or bias, config.mlp_output_bias or bias
        linears = {  # role -> inputs, outputs, bias
            "query": (size, mixed, qkv_bias), "key": (size, shared, qkv_bias), "value": (size, shared, qkv_bias),
            "gate": (size, channels, bias), "up": (size, channels, bias),
            "attention_output": (mixed, size, attention_bias), "down": (channels, size, mlp_bias),
        }  # fmt: skip
        norms = {"attention_norm": size, "mlp_norm": size} | dict.fromkeys(HEAD_NORMS, self.head_dim)
        for role, features in norms.items():
            if role in self.roles:
                self.place(role, RMSNorm(features, config.rms_norm_eps))
        for role, (inputs, outputs, has_bias) in linears.items():
            if role in self.roles:
                self.place(role, nn.Linear(inputs, outputs, bias=has_bias))
        if self.has_attention:
            self.place("core", AttentionCore(config))

    def project(self, h):
        """Queries, keys and values of the normed stream: (B, T, C) -> (B, T, H*D), 2 x (B, T, K*D)."""
        return [self.part(role)(h) for role in ("query", "key", "value")]

    def mix(self, x, rotary, mask=None):
        """What attention hands to its output projection: (B, T, C) -> (B, T, H*D)."""
        projected = self.project(self.part("attention_norm")(x))  # (B, T, H*D), 2 x (B, T, K*D)
        query, key, value = (p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projected)  # (B, ., T, D)
        if "query_norm" in self.roles:
            query, key = self.part("query_norm")(query), self.part("key_norm")(key)  # (B, H, T, D), (B, K, T, D)
        mixed = self.part("core")(rotate(query, *rotary), rotate(key, *rotary[:2]), value, mask)  # (B, H, T, D)
        return mixed.transpose(1, 2).flatten(2)

    def activate(self, x):
        """What the MLP hands to its down projection: (B, T, C) -> (B, T, M)."""
        h = self.part("mlp_norm")(x)  # (B, T, C)
        return F.silu(self.part("gate")(h)) * self.part("up")(h)

    def add_attention(self, x, rotary, mask=None):
        """The residual stream with attention's output: (B, T, C) -> (B, T, C)."""
        return x + self.part("attention_output")(self.mix(x, rotary, mask)) if self.has_attention else x

    def add_mlp(self, x):
        """The residual stream with the MLP's output: (..., C) -> (..., C)."""
        return x + self.part("down")(self.activate(x)) if self.has_mlp else x

    def forward(self, x, rotary, mask=None):  # (B, T, C) -> (B, T, C)
        return self.add_mlp(self.add_attention(x, rotary, mask))


class LLaDABlock(Block):
    roles = {
        "attention_norm": "attn_norm", "query": "q_proj", "key": "k_proj", "value": "v_proj", "core": "core",
        "attention_output": "attn_out", "mlp_norm": "ff_norm", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
    }  # fmt: skip

    def __init__(self, config, index: int):
        super().__init__()
        widths = [layer_width(config, index, key) for key in ("n_heads", "n_kv_heads", "mlp_hidden_size")]
        self.build(config, config.d_model, widths, config.include_bias or config.include_qkv_bias, config.include_bias)


class DreamBlock(Block):
    """Of Dream and of all whose layers are named as Qwen's and Llama's; `qk_norm` and `qkv_bias` are of the config."""

    roles = {
        "attention_norm": "input_layernorm", "query": "self_attn.q_proj", "key": "self_attn.k_proj",
        "value": "self_attn.v_proj", "core": "self_attn.core", "attention_output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
        "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm",
    }  # fmt: skip

    def __init__(self, config, index: int):
        super().__init__()
        if not config.qk_norm:
            self.roles = {role: path for role, path in self.roles.items() if role not in HEAD_NORMS}
        keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        self.build(config, config.hidden_size, [layer_width(config, index, key) for key in keys], config.qkv_bias)
