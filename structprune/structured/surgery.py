"""Cutting: a plan applied to a model gives a physically smaller dense one, exactly."""

import torch
from torch import nn

from structprune.models.adapter import Adapter, set_widths
from structprune.models.modeling_structprune import DiffusionLM
from structprune.structured.graph import Coupled, coupled_units
from structprune.structured.plan import BlockPlan, Plan


def expand(units: tuple[int, ...], width: int) -> torch.Tensor:
    """Unit indices -> their neighbouring row or column indices: (U,) -> (U * width,) int64."""
    return (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten()


def pruned_config(model: DiffusionLM, plan: Plan, output_bias: bool = False):
    """The model's configuration with the plan's widths, and biases on both consumers where asked for."""
    adapter = Adapter(model)
    values = set_widths(model.config.to_dict(), adapter.family, [block.widths for block in plan.blocks])
    config = adapter.family.config_class(**values)
    config.dtype = model.dtype
    if output_bias:
        config.attention_output_bias = config.mlp_output_bias = True
    return config


@torch.inference_mode(False)  # so that the new parameters can be trained whoever calls
def apply_plan(
    model: DiffusionLM, plan: Plan, output_bias: bool = False, coupled: dict[tuple[int, str], Coupled] | None = None
) -> DiffusionLM:
    """The model that keeps what `plan` keeps.

    Args:
        output_bias: give the attention output and down projections a bias (zero), for a refit with a constant feature.
        coupled: `coupled_units(model)`, for who applies many plans to one model; traced here where it is None.
    Returns:
        A new model in eval mode. Tensors that are not cut (embeddings, norms, head) are shared with `model`, so that
        both fit in memory; copy it (`copy.deepcopy`) before training one of them while using the other.
    Raises:
        UserError: the plan does not fit the model.
    """
    adapter = Adapter(model)
    plan.check(adapter)
    with torch.device("meta"):
        small = type(model)(pruned_config(model, plan, output_bias))
    coupled = coupled or coupled_units(model)
    state = dict(model.state_dict())
    for block, kept in zip(adapter.blocks, plan.blocks):
        if kept.widths == block.widths:
            continue
        for kind in ("attention", "channels"):
            for name in sorted(coupled[block.index, kind].outputs | coupled[block.index, kind].inputs):
                _cut(state, name, model.get_submodule(name), coupled[block.index, kind], kept, block, kind)
    for name, tensor in small.state_dict().items():
        if output_bias and name not in state:
            state[name] = torch.zeros(tensor.shape, dtype=model.dtype, device=model.device)
        if state[name].shape != tensor.shape:
            raise RuntimeError(
                f"surgery left {name} at {tuple(state[name].shape)}, the plan means {tuple(tensor.shape)}"
            )
    small.load_state_dict(state, assign=True)
    small.source = getattr(model, "source", None)
    return small.eval()


def _cut(state: dict, name: str, module: nn.Linear, coupled: Coupled, kept: BlockPlan, block, kind: str) -> None:
    """Slice one coupled linear's tensors in `state`."""
    if kind == "channels":
        index = expand(kept.channels, 1)
    else:
        # k and v are told from q by their size: only with K < H do they differ, and there the graph's maps are wrong
        size = module.in_features if name in coupled.inputs else module.out_features
        shared = size == block.widths.kv_heads * block.head_dim != block.widths.query_heads * block.head_dim
        index = expand(kept.kv_heads if shared else kept.query_heads, block.head_dim)
    index = index.to(module.weight.device)
    if name in coupled.inputs:
        state[f"{name}.weight"] = state[f"{name}.weight"][:, index].contiguous()  # (O, C) -> (O, kept)
        return
    state[f"{name}.weight"] = state[f"{name}.weight"][index].contiguous()  # (O, C) -> (kept, C)
    if module.bias is not None:
        state[f"{name}.bias"] = state[f"{name}.bias"][index].contiguous()  # (O,) -> (kept,)
