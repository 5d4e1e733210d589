"""Cutting: a plan applied to a model gives a physically smaller dense one, exactly."""

import torch
from torch import nn

from structprune.models.adapter import Adapter, BlockView, UnitKey, set_widths
from structprune.models.experts_structprune import MLP_ROLES, SHARED, role_of
from structprune.models.maps import in_place_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import give_back_memory
from structprune.structured.graph import Coupled, coupled_units
from structprune.structured.plan import BlockPlan, Plan


def expand(units: tuple[int, ...], width: int) -> torch.Tensor:
    """Unit indices -> their neighbouring row or column indices: (U,) -> (U * width,) int64."""
    return (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten()


def pruned_config(model: DiffusionLM, plan: Plan, output_bias: bool = False):
    """The model's configuration with the plan's widths and depth, and biases on both consumers if `output_bias`."""
    adapter = Adapter(model)
    widths = [plan.blocks[index].left_of(adapter.blocks[index].widths) for index in plan.remaining]
    values = set_widths(model.config.to_dict(), adapter.family, widths)
    config = adapter.family.config_class(**values)
    config.dtype = adapter.dtype
    if output_bias:
        config.attention_output_bias = config.mlp_output_bias = True
    return config


@torch.inference_mode(False)  # so that the new parameters can be trained, whatever mode the caller is in
def apply_plan(
    model: DiffusionLM, plan: Plan, output_bias: bool = False, coupled: dict[UnitKey, Coupled] | None = None
) -> DiffusionLM:
    """The model that keeps what `plan` keeps.

    A block that keeps neither heads nor channels is deleted, and those behind it move up: `plan.remaining` maps blocks
    to the dense ones. A block that keeps one of both has no parts of the other.

    Args:
        output_bias: give the attention output and down projections a bias (zero), for a refit with a constant feature.
        coupled: `coupled_units(model)`, to apply many plans to one model; None traces it here. Whole blocks need none.
    Returns:
        A new model in eval mode. It shares uncut tensors (embeddings, norms, head) with `model`, so that both fit in
        memory; copy it (`copy.deepcopy`) before training one of them while using the other.
    Raises:
        UserError: the plan does not fit the model.
    """
    adapter = Adapter(model)
    plan.check(adapter)
    with torch.device("meta"):
        small = type(model)(pruned_config(model, plan, output_bias))
    coupled = coupled_units(model) if coupled is None else coupled
    state = dict(model.state_dict())
    for block, kept in zip(adapter.blocks, plan.blocks, strict=True):
        if kept.left_of(block.widths) != block.widths:
            _cut_block(state, model, block, kept, coupled)
            give_back_memory()
    kept_state = {}
    for name, tensor in small.state_dict().items():
        source = _dense_name(name, adapter.family.blocks, plan.remaining)
        if output_bias and source not in state:
            state[source] = in_place_of(model.embedding.weight, torch.zeros(tensor.shape))
        if state[source].shape != tensor.shape:
            raise RuntimeError(
                f"surgery left {source} at {tuple(state[source].shape)}, the plan needs {tuple(tensor.shape)}"
            )
        kept_state[name] = state[source]
    small.load_state_dict(kept_state, assign=True)
    small.source = getattr(model, "source", None)
    return small.eval()


def _cut_block(
    state: dict[str, torch.Tensor], model: DiffusionLM, block: BlockView, kept: BlockPlan, coupled: dict
) -> None:
    """Slice all tensors of a block in `state` that lose something."""
    for kind, part in kept_parts(block, kept):
        members = coupled[block.index, role_of(kind, part)]
        for name in sorted(members.outputs | members.inputs):
            module = model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            units = kept.channels if kind == "channels" else _heads(module, name in members.inputs, block, kept)
            if part:
                units = kept.shared if part == SHARED else kept.of_expert(int(part), block.widths.channels)
            index = expand(units, 1 if kind == "channels" else block.head_dim).to(module.weight.device)
            _cut(state, name, index, name in members.inputs)
    if block.mixture and kept.channels:
        _keep_experts(state, block, kept.experts)


def kept_parts(block: BlockView, kept: BlockPlan) -> list[tuple[str, str]]:
    """(kind of unit, part) of all that stays in part or whole; the part is "" but for channels of a mixture."""
    if not block.mixture:
        return [(kind, "") for kind in kept.kinds]
    parts = [*map(str, kept.experts), *([SHARED] if kept.shared else [])] if kept.channels else []
    return [(kind, "") for kind in kept.kinds if kind != "channels"] + [("channels", part) for part in parts]


def _keep_experts(state: dict[str, torch.Tensor], block: BlockView, experts: tuple[int, ...]) -> None:
    """Number the experts that stay anew in `state`, and keep their rows of the router."""
    if len(experts) == len(block.expert_parts):
        return
    router, index = f"{block.name}.{block.module.roles['router']}.", torch.tensor(experts)
    for name in [name for name in state if name.startswith(router)]:
        state[name] = in_place_of(state[name], state[name][index.to(state[name].device)].contiguous())  # (E, C) or (E,)
    for new, old in enumerate(experts):  # in rising order, so that none is overwritten before it is read
        for role in MLP_ROLES:
            name, dense = (f"{block.names[role_of(role, str(number))]}.weight" for number in (new, old))
            state[name] = state[dense]


def _dense_name(name: str, blocks: str, remaining: tuple[int, ...]) -> str:
    """The dense model's name of a tensor of the pruned model, whose blocks are numbered anew."""
    if not name.startswith(f"{blocks}."):
        return name
    index, _, rest = name.removeprefix(f"{blocks}.").partition(".")
    return f"{blocks}.{remaining[int(index)]}.{rest}"


def _heads(module: nn.Linear, reads: bool, block: BlockView, kept: BlockPlan) -> tuple[int, ...]:
    """The kept heads of one attention linear: key/value heads for k and v, query heads for q and the output.

    k and v differ from q in size only where K < H, and there the graph's index maps are wrong.
    """
    size = module.in_features if reads else module.out_features
    shared = size == block.widths.kv_heads * block.head_dim != block.widths.query_heads * block.head_dim
    return kept.kv_heads if shared else kept.query_heads


def _cut(state: dict[str, torch.Tensor], name: str, index: torch.Tensor, reads: bool) -> None:
    """Slice one linear's tensors in `state`: its input columns if it `reads` the units, else its output rows."""
    if reads:
        weight = state[f"{name}.weight"]  # (O, C)
        state[f"{name}.weight"] = in_place_of(weight, weight[:, index].contiguous())  # (O, kept)
        return
    for key in {f"{name}.weight", f"{name}.bias"} & state.keys():
        state[key] = in_place_of(state[key], state[key][index].contiguous())  # (O, C) -> (kept, C), (O,) -> (kept,)
