"""The dry runs: what a checkpoint would lose and what the run would need, without reading a weight."""

from dataclasses import asdict
from pathlib import Path

import torch

from structprune.bench.mask_memory import predicted_mask_peak
from structprune.bench.memory import predicted_peak
from structprune.bench.work_size import mask_work_bytes, structured_work_bytes
from structprune.calibration.build import check_length
from structprune.config import Config
from structprune.levels.cost import search_cost
from structprune.models.adapter import Adapter
from structprune.models.experts_structprune import role_and_part
from structprune.models.families import ROLES
from structprune.models.modeling_structprune import DiffusionLM
from structprune.refit.masked import STEPS
from structprune.runs.budget import within_memory
from structprune.runs.expected import even_choices, expected_model, pruned_ghost
from structprune.runs.ghost import read_ghost
from structprune.runs.resolve import at_ratio, check_given_plan, resolve_masking, resolve_structured
from structprune.structured.allocate import Counts, ratio_of
from structprune.structured.choose import channel_multiple
from structprune.structured.plan import Plan
from structprune.structured.request import StructuredRequest
from structprune.structured.sizes import block_size, forward_macs, widths_after


def inspect_checkpoint(source: str | Path, config: Config, plan: Plan | None = None) -> dict:
    """Units, parameters, bytes and MACs before and after, per block, and the predicted peak memory of the run.

    No weight is read: a directory that holds only config.json is enough, and headers of shards are checked against it.
    Scores decide at run time which blocks lose most under `global` allocation, and how many heads the `measured` and
    `by-cost` splits remove. Shown is the same total spread evenly, with every possible number of heads beside it.

    Args:
        plan: is checked against the model and the export class; the figures follow `config` all the same.
    Returns:
        Plain data, as `report.tables.inspect_tables` shows it.
    Raises:
        UserError: a checkpoint, configuration or plan that the run would refuse too.
    """
    ghost = read_ghost(source, config.model)
    model, adapter, stored = ghost.model, ghost.adapter, ghost.stored
    request = resolve_structured(config, model, dry_run=True)
    check_length(model, request.config)
    if plan is None:
        request = at_ratio(request, None)
    else:
        check_given_plan(request, model, plan, ghost.values)
    request = within_memory(request, model, stored, plan)
    settings, sizes, length = request.settings, request.sizes, request.calibration.length
    choices, shown = even_choices(request)
    after = Adapter(pruned_ghost(model, adapter, choices[shown], settings.gqa))
    blocks = _block_rows(adapter, after)
    before_total, after_total = (sum(row["parameters"][side] for row in blocks) for side in (0, 1))
    return {
        "source": ghost.name,
        "family": adapter.family.name,
        "ratio": settings.ratio,
        "tokens": length,
        "stored_dtype": str(stored).removeprefix("torch."),
        "parameters": {"before": model.num_parameters(), "after": after.model.num_parameters()},
        "block_parameters": {"before": before_total, "after": after_total},
        "macs": {"before": forward_macs(adapter, length), "after": forward_macs(after, length)},
        "bytes": {"before": ghost.stored_bytes, "after": after.model.num_parameters() * stored.itemsize},
        "shown": f"shown for {shown} attention steps removed in each",
        "choices": [_choice_row(adapter, sizes, steps, counts, settings.gqa) for steps, counts in choices.items()],
        "blocks": blocks,
        "rounding": channel_multiple(sizes, settings),
        "memory": predicted_peak(adapter, after, request, stored),
        "work": structured_work_bytes(adapter, [request], request.resources.weight_dtype(stored).itemsize),
        "search": _search(adapter, request, stored),
        "latency": _latency(request),
    }


def _search(adapter: Adapter, request: StructuredRequest, stored: torch.dtype) -> dict | None:
    """What a search would take, None without one."""
    if not request.config.search.enabled or request.settings.ratio == 0:
        return None
    return search_cost(adapter, request, request.resources.weight_dtype(stored).itemsize).plain()


def _latency(request: StructuredRequest) -> dict | None:
    """The target that the run meets by times that it measures, which decide the ratio; None without one."""
    search = request.config.search
    if search.budget != "latency":
        return None
    length = search.latency_length or request.calibration.length
    return {"target_ms": search.target_ms, "batch": search.latency_batch, "length": length}


def _choice_row(adapter: Adapter, sizes, steps: int, counts: Counts, form: str) -> dict:
    # a block with both kinds, if there is one; of several the first of the largest
    index = max(sizes, key=lambda size: (len(size.step), size.total)).index
    widths = widths_after(adapter.blocks[index].widths, counts, index, form)
    return {"steps": steps, **asdict(widths), "ratio": ratio_of(sizes, counts)}


def _block_rows(before: Adapter, after: Adapter) -> list[dict]:
    return [
        {
            "index": old.index,
            "before": asdict(old.widths),
            "after": asdict(new.widths),
            "parameters": [block_size(block, "query_heads").total for block in (old, new)],
        }
        for old, new in zip(before.blocks, after.blocks)
    ]


def inspect_masking(source: str | Path, config: Config) -> dict:
    """Zeros per kind of projection and predicted peak memory of an unstructured or N:M run; no weight is read.

    `owl` decides at run time how the ratio is spread over blocks; shown is the total.

    Returns:
        Plain data, as `report.tables.mask_inspect_tables` shows it.
    Raises:
        UserError: a checkpoint or configuration that the run would refuse too.
    """
    ghost = read_ghost(source, config.model)
    model, adapter = ghost.model, ghost.adapter
    request = within_memory(resolve_masking(config, model, dry_run=True), model, ghost.stored)
    if request.reads_text:
        check_length(model, request.config)
    settings = request.settings
    kinds = dict.fromkeys(ROLES, 0)
    for block in adapter.blocks:
        for role in block.names:
            kinds[role_and_part(role)[0]] += block[role].weight.numel()
    zeros = {role: {"weights": count, "zero": round(count * request.ratio)} for role, count in kinds.items()}
    return {
        "source": ghost.name,
        "family": adapter.family.name,
        "method": config.method,
        "score": request.name,
        "arm": request.arm,
        "ratio": request.ratio,
        "pattern": settings.nm if request.nm else None,
        "rest": f", {settings.order}" * (request.arm is not None) + f", {settings.allocation} allocation",
        "refit_operations": refit_operations(adapter) if request.reconstruct.enabled else 0,
        "parameters": model.num_parameters(),
        "projections": zeros,
        "stored_dtype": str(ghost.stored).removeprefix("torch."),
        "bytes": ghost.stored_bytes,
        "mask_bytes": sum(kinds.values()) // 8,
        "memory": predicted_mask_peak(adapter, request, ghost.stored),
        "work": mask_work_bytes(adapter, request, ghost.stored),
    }


def refit_operations(adapter: Adapter) -> float:
    """Most floating-point operations of a refit under masks: `STEPS` products of every matrix with a Gram matrix."""
    shapes = [block[role].weight.shape for block in adapter.blocks for role in block.names]
    return sum(2.0 * STEPS * rows * columns**2 for rows, columns in shapes)


def left_by(config: Config, model: DiffusionLM) -> DiffusionLM | None:
    """A meta model of about the shapes that a run leaves of `model`; None where it makes masks."""
    if config.method != "structured":
        return None
    return expected_model(model, resolve_structured(config, model, dry_run=True))
