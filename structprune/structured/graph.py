"""The torch-pruning boundary: which slices of which modules belong together, from a trace of the module.

Only membership is taken from the graph. Its index maps are wrong for grouped-query attention and its ranges are
unchecked, so indices are ours (`structured.surgery`). The trace runs on the meta device: no weight is touched.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from structprune.models.adapter import CONSUMER, Adapter, BlockView, ExpertWidths, UnitKey, set_widths
from structprune.models.experts_structprune import role_and_part, role_of
from structprune.models.layers_structprune import RMSNorm
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.rotary_structprune import rotary_tables


@dataclass(frozen=True)
class Coupled:
    """Names of the modules that are cut with one kind of unit in one block."""

    outputs: frozenset[str]  # they lose output rows
    inputs: frozenset[str]  # they lose input columns

    def of_expert(self, traced: BlockView, block: BlockView, part: str) -> "Coupled":
        """The same modules of another part of a mixture; itself for "" (not of a mixture).

        Args:
            traced: the block whose first expert's modules these are.
        """
        if not part:
            return self
        roles = {name: role_and_part(role)[0] for role, name in traced.names.items()}
        sides = ({block.names[role_of(roles[name], part)] for name in side} for side in (self.outputs, self.inputs))
        return Coupled(*map(frozenset, sides))


def coupled_units(model: DiffusionLM) -> dict[UnitKey, Coupled]:
    """(block, kind of unit) -> the modules that the dependency graph couples to the block's consumer input."""
    import torch_pruning as tp

    with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
        ghost = type(model)(_traced_config(model))
        # whole heads turn: a head joined of two parts would double the library's index maps at every step
        ghost.rotary = partial(_whole_heads, ghost.config.head_dim)  # type: ignore[method-assign]
        graph = tp.DependencyGraph()
        ids = torch.zeros(1, 4, dtype=torch.long)  # (1, 4)
        norms = [(module.weight, 0) for module in ghost.modules() if isinstance(module, RMSNorm)]
        routers = [block.mixture.part("router") for block in Adapter(ghost).blocks if block.mixture]
        norms += [(weight, weight.dim() - 1) for router in routers for weight in router.parameters()]
        graph.build_dependency(
            ghost, {"input_ids": ids}, output_transform=lambda out: out.logits, unwrapped_parameters=norms
        )
    names, dense = {module: name for name, module in ghost.named_modules()}, Adapter(model).blocks
    coupled = {}
    for block in Adapter(ghost).blocks:
        # experts are alike: of a mixture the first one is traced
        places = [(kind, "") for kind in block.kinds] + [("channels", part) for part in block.expert_parts[:1]]
        for kind, part in places:
            consumer = block[role_of(CONSUMER[kind], part)]
            group = graph.get_pruning_group(consumer, tp.prune_linear_in_channels, idxs=[0])
            sides: dict[str, set[str]] = {"out": set(), "in": set()}
            for item in group:
                target = item.dep.target.module
                if isinstance(target, torch.nn.Linear):  # other members are the trace's bookkeeping of shapes
                    side = "out" if item.dep.handler == tp.prune_linear_out_channels else "in"
                    sides[side].add(names[target])
            members = Coupled(frozenset(sides["out"]), frozenset(sides["in"]))
            for each in block_parts(dense[block.index], part):
                coupled[block.index, role_of(kind, each)] = members.of_expert(block, dense[block.index], each)
    return coupled


def _whole_heads(head_dim: int, length: int, device, *_):
    """RoPE tables of all features of a head, as `DiffusionLM.rotary` gives them to most models."""
    return rotary_tables(torch.arange(length, device=device)[None], head_dim, 10000.0)


def block_parts(block: BlockView, part: str) -> tuple[str, ...]:
    """The parts of a mixture that a traced expert stands for; the MLP itself, "", of a plain one."""
    return block.module.parts if part else ("",)


def _traced_config(model: DiffusionLM):
    """The model's configuration with as many KV heads as query heads, which couple the same modules, and few experts.

    With two query heads per KV head the library's index maps double at every step, and `get_pruning_group` never ends.
    """
    adapter = Adapter(model)
    widths = []
    for block in adapter.blocks:
        own = replace(block.widths, kv_heads=block.widths.query_heads)
        if block.mixture and isinstance(own, ExpertWidths):  # as few experts as can be: a trace of all takes minutes
            own = replace(own, experts=block.mixture.router.least)
        widths.append(own)
    return adapter.family.config_class(**set_widths(model.config.to_dict(), adapter.family, widths))
