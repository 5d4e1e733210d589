"""Mixtures of experts: MLPs of which a router picks a few for every token, and blocks that have them.

Copied next to checkpoints of families that use it: imports torch and the files beside it only.
Shapes: n tokens, k experts of a token, E experts, C features, M channels of an expert.
Papers: sparsely gated experts arXiv 1701.06538, with many small ones OLMoE arXiv 2409.02060.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .layers_structprune import HEAD_NORMS, DreamBlock, layer_width

SHARED = "shared"  # the part of a mixture that all tokens go through
MLP_ROLES = ("gate", "up", "down")


def role_of(role: str, part: str) -> str:
    """The role of a linear in a part of the MLP: an expert's number, `SHARED`, or "" where the MLP is one."""
    return f"{role}.{part}" if part else role


def role_and_part(role: str) -> tuple[str, str]:
    """The inverse of `role_of`, also for names of inputs."""
    base, _, part = role.partition(".")
    return base, part


def tokens_of(chosen, expert: int):
    """The tokens that an expert sees, in their order, and its place among their k: (n, k) int64 -> two (m,)."""
    return (chosen == expert).nonzero(as_tuple=True)


def tokens_by_expert(chosen, experts: int):
    """`tokens_of` every expert, with one device sync for all: (n, k) int64 -> E x two (m,)."""
    numbers, order = chosen.flatten().sort(stable=True)  # (n * k,) each
    starts = torch.searchsorted(numbers, torch.arange(experts + 1, device=chosen.device)).tolist()
    places = order // chosen.shape[1], order % chosen.shape[1]  # (n * k,) each
    return [tuple(place[start:stop] for place in places) for start, stop in zip(starts, starts[1:])]


class SoftmaxRouter(nn.Module):
    """Shares of all experts by a softmax, of which the largest k count as they are: they need not sum to 1.

    `groups`: of experts, which keep as many of each where some go; `least`: experts that must stay.
    """

    groups = 1

    def __init__(self, size: int, experts: int, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size).normal_(std=config.initializer_range))
        self.top_k = self.least = min(config.num_experts_per_tok, experts)

    def forward(self, rows):  # (n, C) -> weights (n, k) fp32 and experts (n, k) int64, the likeliest first
        shares = F.linear(rows, self.weight).float().softmax(-1)  # (n, E)
        weights, chosen = shares.topk(self.top_k, dim=-1)  # (n, k) each
        return weights, chosen


class ExpertBlock(DreamBlock):
    """A block whose MLP is a mixture of experts, or a plain one where its number of experts is 0.

    Widths are, by `config.width_names`: query heads, key/value heads, channels of an expert (or of the plain MLP),
    experts, and channels of what all tokens go through (0: there is nothing such).
    """

    router_class: Any = SoftmaxRouter
    router_path, experts_path, shared_path = "mlp.gate", "mlp.experts", "mlp.shared_experts"

    def __init__(self, config, index: int):
        nn.Module.__init__(self)
        size, widths = config.hidden_size, [layer_width(config, index, key) for key in config.width_names]
        *own, experts, shared = widths
        absent = (() if config.qk_norm else HEAD_NORMS) + (MLP_ROLES if experts else ())
        self.roles = {role: path for role, path in self.roles.items() if role not in absent}
        self.build(config, size, own, config.qkv_bias)
        if not experts or not self.has_mlp:
            return
        self.roles["router"] = self.router_path
        self.place("router", self.router_class(size, experts, config))
        for number in range(experts):
            self._add_part(str(number), f"{self.experts_path}.{number}", (size, own[2]))
        if shared:
            self._add_part(SHARED, self.shared_path, (size, shared))

    def _add_part(self, part: str, path: str, sizes: tuple[int, int]) -> None:
        """Place the linears of an expert, or of what all tokens go through; `sizes` are C and M."""
        self.parts = (*self.parts, part)
        for role in MLP_ROLES:
            name = role_of(role, part)
            self.roles[name] = f"{path}.{role}_proj"
            self.place(name, nn.Linear(*(sizes[::-1] if role == "down" else sizes), bias=False))

    @property
    def experts(self) -> int:
        """E, 0 of a plain MLP."""
        return sum(part != SHARED for part in self.parts)

    @property
    def router(self) -> Any:
        """What picks the experts of a token; see `SoftmaxRouter`."""
        return self.part("router")

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self.router.top_k

    def gated(self, part: str, rows):
        """What a part of the mixture hands to its down projection: normed (..., C) -> (..., M)."""
        return F.silu(self.part(role_of("gate", part))(rows)) * self.part(role_of("up", part))(rows)

    def expert(self, part: str, rows):
        """One part of the mixture: normed (..., C) -> (..., C)."""
        return self.part(role_of("down", part))(self.gated(part, rows))

    def seen(self, x, part: str):
        """The tokens that an expert sees of the stream before the MLP, in their order: (..., C) -> (m,)."""
        rows = self.part("mlp_norm")(x).flatten(0, -2)  # (n, C)
        return tokens_of(self.part("router")(rows)[1], int(part))[0]

    def add_mlp(self, x):
        if not self.parts:
            return super().add_mlp(x)
        h = self.part("mlp_norm")(x)  # (..., C)
        rows = h.reshape(-1, h.shape[-1])  # (n, C)
        weights, chosen = self.part("router")(rows)  # (n, k) each
        mixed = torch.zeros_like(rows, dtype=torch.float32)  # (n, C)
        if rows.is_meta:  # a pass that knows shapes alone: every expert sees all tokens
            seen = [(torch.arange(len(rows), device=rows.device), torch.zeros_like(chosen[:, 0]))] * self.experts
        else:
            seen = tokens_by_expert(chosen, self.experts)
        for number, (tokens, place) in enumerate(seen):  # (m,) each
            output = self.expert(str(number), rows[tokens])  # (m, C)
            # an expert sees a token once: nothing is added up, which index_add does row by row on a CPU
            mixed[tokens] = mixed[tokens] + output.float() * weights[tokens, place, None]  # (m, C)
        y = mixed.to(x.dtype).view(h.shape)  # (..., C)
        return x + (y + self.expert(SHARED, h) if SHARED in self.parts else y)
