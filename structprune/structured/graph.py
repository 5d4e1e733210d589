"""The torch-pruning boundary: which slices of which modules belong together, from a trace of the module.

Only membership is taken from the graph. Its index maps are wrong for grouped-query attention and its ranges are
unchecked, so indices are ours (`structured.surgery`). The trace runs on the meta device: no weight is touched.
"""

from dataclasses import dataclass, replace

import torch

from structprune.models.adapter import CONSUMER, Adapter, UnitKey, set_widths
from structprune.models.layers_structprune import RMSNorm
from structprune.models.modeling_structprune import DiffusionLM


@dataclass(frozen=True)
class Coupled:
    """Names of the modules that are cut with one kind of unit in one block."""

    outputs: frozenset[str]  # they lose output rows
    inputs: frozenset[str]  # they lose input columns


def coupled_units(model: DiffusionLM) -> dict[UnitKey, Coupled]:
    """(block, kind of unit) -> the modules that the dependency graph couples to the block's consumer input."""
    import torch_pruning as tp

    with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
        ghost = type(model)(_traced_config(model))
        graph = tp.DependencyGraph()
        ids = torch.zeros(1, 4, dtype=torch.long)  # (1, 4)
        norms = [(module.weight, 0) for module in ghost.modules() if isinstance(module, RMSNorm)]
        graph.build_dependency(
            ghost, {"input_ids": ids}, output_transform=lambda out: out.logits, unwrapped_parameters=norms
        )
    names = {module: name for name, module in ghost.named_modules()}
    coupled = {}
    for block in Adapter(ghost).blocks:
        for kind in block.kinds:
            group = graph.get_pruning_group(block[CONSUMER[kind]], tp.prune_linear_in_channels, idxs=[0])
            sides: dict[str, set[str]] = {"out": set(), "in": set()}
            for item in group:
                target = item.dep.target.module
                if isinstance(target, torch.nn.Linear):  # other members are the trace's bookkeeping of shapes
                    side = "out" if item.dep.handler == tp.prune_linear_out_channels else "in"
                    sides[side].add(names[target])
            coupled[block.index, kind] = Coupled(frozenset(sides["out"]), frozenset(sides["in"]))
    return coupled


def _traced_config(model: DiffusionLM):
    """The model's configuration with as many KV heads as query heads, which couple the same modules.

    With two query heads per KV head the library's index maps double at every step, and `get_pruning_group` never ends.
    """
    adapter = Adapter(model)
    widths = [replace(block.widths, kv_heads=block.widths.query_heads) for block in adapter.blocks]
    return adapter.family.config_class(**set_widths(model.config.to_dict(), adapter.family, widths))
