"""Times of the parts of a model at several widths: the table that a budget of milliseconds is spent by.

Shapes: B sequences, T tokens, C features.
"""

from collections.abc import Callable
from functools import partial

import torch

from structprune.bench.latency import Timing, interleaved, random_ids
from structprune.bench.machine import describe_machine
from structprune.bench.settings import Size
from structprune.errors import UserError
from structprune.levels.latency import LatencyTable, make_table, measured_steps
from structprune.models.adapter import Adapter, BlockView, Widths, set_widths
from structprune.models.layers_structprune import Block
from structprune.models.modeling_structprune import DiffusionLM
from structprune.structured.sizes import block_size, widths_after

REPEATS = 4  # of a part in a timed call, so that the pause before the first weighs less
Shared = dict[tuple[str, Widths], list[BlockView]]  # kind and widths, 0 of the other kind -> the blocks with them


@torch.inference_mode()
def measure_table(model: DiffusionLM, form: str, multiple: int, size: Size, timing: Timing) -> LatencyTable:
    """Time the model, and its attentions and MLPs at several widths, in turns on the device that it is on.

    Narrow parts are slices of the dense weights. Parts of equal shapes are measured once.

    Args:
        form: the attention unit, `query_heads` or `kv_groups`. multiple: of remaining MLP widths.
        size: of the random ids (B, T).
    Raises:
        UserError: the blocks take no time that could be told from noise.
    """
    adapter = Adapter(model)
    ids = random_ids(model, size.batch, size.length)  # (B, T)
    x, context = model.embedding(ids), model.context(ids.shape, ids.device)  # (B, T, C)
    shared = shared_parts(adapter)
    calls: dict[str, Callable] = {"dense": partial(model, ids), "rest": partial(_rest, model, ids)}
    for (kind, widths), blocks in shared.items():
        first = block_size(blocks[0], form)
        for steps in measured_steps(first, kind, multiple):
            narrow = widths_after(widths, {(first.index, kind): steps}, first.index, form)
            part = narrow_block(adapter, blocks[0], narrow)
            work = partial(part.add_attention, x, *context) if kind == "attention" else partial(part.add_mlp, x)
            calls[f"{kind} {first.index} {steps}"] = partial(_repeat, work)
    ms = {name: latency.median_ms for name, latency in interleaved(calls, ids.device, timing).items()}
    if ms["dense"] <= ms["rest"]:
        raise UserError(
            f"a forward pass over {size} tokens takes {ms['dense']:.3f} ms, its blocks no time that can be told from"
            " noise: raise search.latency_batch or search.latency_length"
        )
    times = {}
    for (kind, _), blocks in shared.items():
        first = block_size(blocks[0], form)
        key = kind, tuple(block.index for block in blocks), first.steps[kind]
        names = {steps: f"{kind} {first.index} {steps}" for steps in measured_steps(first, kind, multiple)}
        times[key] = {steps: ms[name] / REPEATS for steps, name in names.items()}
    return make_table(ms["dense"], ms["rest"], times, table_identity(model, form, multiple, size))


def shared_parts(adapter: Adapter) -> Shared:
    """The attentions and MLPs of a model by their shapes."""
    result: Shared = {}
    for block in adapter.blocks:
        for kind in block.kinds:
            old = block.widths
            own = Widths(0, 0, old.channels) if kind == "channels" else Widths(old.query_heads, old.kv_heads, 0)
            result.setdefault((kind, own), []).append(block)
    return result


def narrow_block(adapter: Adapter, dense: BlockView, widths: Widths) -> Block:
    """A block of `widths`, at most the dense block's, with the first rows and columns of its weights."""
    every = [*(block.widths for block in adapter.blocks), widths]
    config = adapter.family.config_class(**set_widths(adapter.model.config.to_dict(), adapter.family, every))
    with torch.device("meta"):
        block = type(dense.module)(config, len(every) - 1)
    weights = dense.module.state_dict()
    state = {
        name: weights[name][tuple(map(slice, tensor.shape))].clone() for name, tensor in block.state_dict().items()
    }
    block.load_state_dict(state, assign=True)
    return block.eval()


def table_identity(model: DiffusionLM, form: str, multiple: int, size: Size) -> dict:
    """What decides a table beside chance, as plain data: device, dtype, versions, workload and shapes."""
    adapter, machine = Adapter(model), describe_machine()
    cuda = adapter.device.type == "cuda"
    widths = [[block.widths.query_heads, block.widths.kv_heads, block.widths.channels] for block in adapter.blocks]
    return {
        "device": torch.cuda.get_device_name(adapter.device) if cuda else machine["processor"],
        "number of threads": None if cuda else machine["threads"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "release of torch": machine["torch"],
        "batch": size.batch,
        "length": size.length,
        "model": [adapter.family.name, adapter.hidden_size, adapter.head_dim, adapter.vocabulary, *widths],
        "structured.gqa": form,
        "structured.round_to": multiple,
    }


def _rest(model: DiffusionLM, ids: torch.Tensor) -> torch.Tensor:
    """What a forward pass over ids (B, T) does outside the blocks."""
    x = model.embedding(ids)  # (B, T, C)
    model.context(ids.shape, ids.device)
    return model.output_head(model.final_norm(x))


def _repeat(work: Callable) -> None:
    for _ in range(REPEATS):
        work()
