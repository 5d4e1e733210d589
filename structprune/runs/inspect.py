"""The dry run: what a checkpoint would lose at a ratio, from config.json and safetensors headers alone."""

from dataclasses import asdict
from pathlib import Path

import torch

from structprune.bench.mask_memory import predicted_mask_peak
from structprune.bench.memory import predicted_peak
from structprune.calibration.build import check_length
from structprune.checkpoint.export import check_export_request
from structprune.config import Config, StructuredSettings
from structprune.masking.rows import reads_text
from structprune.models.adapter import Adapter, Widths, set_widths
from structprune.models.checkpoint_files import stored_headers
from structprune.models.loading import DTYPES, as_dtype, check_shapes, load_config, source_name
from structprune.models.modeling_structprune import DiffusionLM
from structprune.refit.masked import STEPS
from structprune.runs.mask_request import check_mask_request, removed_ratio
from structprune.runs.prune import check_plan, check_request
from structprune.structured.allocate import Counts, chosen_heads, equal_heads, ratio_of
from structprune.structured.choose import candidates, channel_multiple, open_blocks
from structprune.structured.paths import KINDS
from structprune.structured.plan import Plan
from structprune.structured.sizes import BlockSize, block_size, forward_macs


def inspect_checkpoint(source: str | Path, config: Config, plan: Plan | None = None) -> dict:
    """Units, parameters, bytes and MACs before and after, per block, and the predicted peak memory of the run.

    No weight is read: a directory that holds only config.json is enough (headers, where there are shards, are checked
    against it). Scores decide at run time which blocks lose most under `global` allocation and which number of heads
    the `measured` and `by-cost` splits choose; shown is the same total spread evenly, with every number of heads that
    is possible beside it.

    Args:
        plan: is checked against the model and the export class asked for; what is shown is by `config` all the same.
    Returns:
        Plain data, as `report.tables.inspect_tables` shows it.
    Raises:
        UserError: a checkpoint, configuration or plan that the run would refuse too.
    """
    settings = config.structured
    directory, family, model, values = _ghost(source, config)
    adapter = Adapter(model)
    check_request(model, config)
    if plan is None:
        check_export_request(config)
    else:
        check_plan(model, plan, config, values)
    stored = _stored(source, directory, model, config, values)
    sizes = open_blocks(adapter, settings)
    even = settings.model_copy(update={"allocation": "uniform"}) if settings.allocation == "global" else settings
    choices = candidates(sizes, even)
    shown = _shown(settings, sizes, choices)
    after = Adapter(pruned_ghost(model, adapter, choices[shown], settings.gqa))
    length = config.calibration.length
    return {
        "source": source_name(source, directory),
        "family": family.name,
        "ratio": settings.ratio,
        "tokens": length,
        "stored_dtype": str(stored).removeprefix("torch."),
        "parameters": {"before": model.num_parameters(), "after": after.model.num_parameters()},
        "block_parameters": {"before": _projections(adapter), "after": _projections(after)},
        "macs": {"before": forward_macs(adapter, length), "after": forward_macs(after, length)},
        "bytes": {
            "before": model.num_parameters() * stored.itemsize,
            "after": after.model.num_parameters() * stored.itemsize,
        },
        "shown": f"shown for {shown} attention steps removed in each",
        "choices": [_choice_row(adapter, sizes, steps, counts, settings.gqa) for steps, counts in choices.items()],
        "blocks": _block_rows(adapter, after),
        "rounding": channel_multiple(sizes, settings),
        "memory": predicted_peak(adapter, after, config, stored),
    }


def inspect_masking(source: str | Path, config: Config) -> dict:
    """Zeros per kind of projection and predicted peak memory of an unstructured or N:M run; no weight is read.

    `owl` decides at run time how the ratio is spread over blocks; shown is the whole.

    Returns:
        Plain data, as `report.tables.mask_inspect_tables` shows it.
    Raises:
        UserError: a checkpoint or configuration that the run would refuse too.
    """
    directory, family, model, values = _ghost(source, config)
    adapter = Adapter(model)
    base, arm = check_mask_request(model, config)
    stored = _stored(source, directory, model, config, values)
    check_length(model, config, reads_text(config, arm))
    kinds = {role: sum(block[role].weight.numel() for block in adapter.blocks) for role in adapter.blocks[0].names}
    ratio = removed_ratio(config)
    return {
        "source": source_name(source, directory),
        "family": family.name,
        "method": config.method,
        "score": base,
        "arm": arm,
        "ratio": ratio,
        "pattern": config.masking.nm if config.method == "nm" else None,
        "rest": f", {config.masking.order}" * (arm is not None) + f", {config.masking.allocation} allocation",
        "refit_operations": refit_operations(adapter) if config.reconstruct.enabled else 0,
        "parameters": model.num_parameters(),
        "projections": {role: {"weights": count, "zero": round(count * ratio)} for role, count in kinds.items()},
        "stored_dtype": str(stored).removeprefix("torch."),
        "bytes": model.num_parameters() * stored.itemsize,
        "mask_bytes": sum(kinds.values()) // 8,
        "memory": predicted_mask_peak(adapter, config, stored),
    }


def refit_operations(adapter: Adapter) -> float:
    """Floating-point operations of a refit under masks at most: `STEPS` products of every matrix with a Gram matrix."""
    shapes = [block[role].weight.shape for block in adapter.blocks for role in block.names]
    return sum(2.0 * STEPS * rows * columns**2 for rows, columns in shapes)


def _shown(settings: StructuredSettings, sizes: list[BlockSize], choices: dict[int, Counts]) -> int:
    """Attention steps per block to show: those asked for, a share of those asked for over all blocks, or equal ones."""
    if not isinstance(settings.split, int):
        return equal_heads(sizes, settings.ratio, choices)
    if settings.allocation != "global":
        return chosen_heads(settings.split, choices)
    return min(choices, key=lambda steps: abs(steps * len(sizes) - settings.split))


def widths_after(widths: Widths, counts: Counts, index: int, form: str) -> Widths:
    """The widths of block `index` when its steps in `counts` are gone; those of `widths` where it has none."""
    steps, channels = (counts.get((index, kind), 0) for kind in KINDS)
    per = widths.query_heads // widths.kv_heads  # query heads per KV head
    if per == 1 or form == "kv_groups":
        query_heads, kv_heads = widths.query_heads - per * steps, widths.kv_heads - steps
    else:
        query_heads, kv_heads = widths.query_heads - widths.kv_heads * steps, widths.kv_heads
    return Widths(query_heads, kv_heads, widths.channels - channels)


def pruned_ghost(model: DiffusionLM, adapter: Adapter, counts: Counts, form: str) -> DiffusionLM:
    """A model on the meta device with the widths that `counts` leave."""
    family = adapter.family
    left = [widths_after(block.widths, counts, block.index, form) for block in adapter.blocks]
    with torch.device("meta"):
        return family.model_class(family.config_class(**set_widths(model.config.to_dict(), family, left)))


def _ghost(source: str | Path, config: Config):
    """A checkpoint without its weights: directory, family, model on the meta device, config.json's contents."""
    directory, family, model_config, values = load_config(source, config.model.mask_id)
    with torch.device("meta"):
        return directory, family, family.model_class(model_config), values


def _stored(source: str | Path, directory: Path, model: DiffusionLM, config: Config, values: dict) -> torch.dtype:
    """The weights' dtype, from headers where there are any, which are checked against the model; else config.json's."""
    headers = stored_headers(source, directory, config.model.allow_pickle)
    if not headers:
        return as_dtype(str(values.get("torch_dtype") or values.get("dtype") or "bfloat16").removeprefix("torch."))
    check_shapes(model, {name: header.shape for name, header in headers.items()}, directory)
    kinds = [DTYPES.get(header.dtype, torch.float32) for header in headers.values()]
    return max(kinds, key=kinds.count)


def _projections(adapter: Adapter) -> int:
    return sum(block_size(block, "query_heads").total for block in adapter.blocks)


def _choice_row(adapter: Adapter, sizes, steps: int, counts: Counts, form: str) -> dict:
    widths = widths_after(adapter.blocks[sizes[0].index].widths, counts, sizes[0].index, form)
    return {"steps": steps, **asdict(widths), "ratio": ratio_of(sizes, counts)}


def _block_rows(before: Adapter, after: Adapter) -> list[dict]:
    rows = []
    for old, new in zip(before.blocks, after.blocks):
        totals = [block_size(block, "query_heads").total for block in (old, new)]
        row = {"index": old.index, "before": asdict(old.widths), "after": asdict(new.widths), "parameters": totals}
        rows.append(row)
    return rows
