"""The dry run: what a checkpoint would lose at a ratio, from config.json and safetensors headers alone."""

from dataclasses import asdict
from pathlib import Path

import torch

from structprune.bench.memory import predicted_peak
from structprune.config import Config
from structprune.criteria.paths import RemovalPath
from structprune.criteria.ranking import block_groups
from structprune.criteria.table import resolve_arm
from structprune.models.adapter import Adapter, set_widths
from structprune.models.checkpoint_files import WEIGHT_FILE, read_headers, shard_names
from structprune.models.families import Family
from structprune.models.loading import DTYPES, check_shapes, load_config
from structprune.models.modeling_structprune import DiffusionLM
from structprune.structured.allocate import Counts, equal_heads, ratio_of
from structprune.structured.choose import candidates, channel_multiple, check_split, open_blocks
from structprune.structured.plan import Plan, make_plan
from structprune.structured.sizes import block_size, forward_macs


def inspect_checkpoint(source: str | Path, config: Config) -> dict:
    """Units, parameters, bytes and MACs before and after, per block, and the predicted peak memory of the run.

    No weight is read: a directory that holds only config.json is enough (headers, where there are shards, are checked
    against it). Scores decide at run time which blocks lose most under `global` allocation and which number of heads
    the `measured` and `by-cost` splits choose; shown is the same total spread evenly, with every number of heads that
    is possible beside it.

    Returns:
        Plain data, as `report.tables.inspect_tables` shows it.
    Raises:
        UserError: a checkpoint or ratio that the run would refuse too.
    """
    settings = config.structured
    resolve_arm(settings.score, settings.arm)
    check_split(settings)
    directory, family, model_config, values = load_config(source, config.model.mask_id)
    with torch.device("meta"):
        model = family.model_class(model_config)
    adapter = Adapter(model)
    stored = _stored_dtype(directory, model, values, config.model.allow_pickle)
    sizes = open_blocks(adapter, settings)
    even = settings.model_copy(update={"allocation": "uniform"}) if settings.allocation == "global" else settings
    choices = candidates(sizes, even)
    shown = settings.split if settings.split in choices else equal_heads(sizes, settings.ratio, choices)
    plan = plan_by_counts(adapter, choices[shown], settings.gqa)
    after = Adapter(pruned_ghost(family, model, plan))
    length = config.calibration.length
    return {
        "source": str(directory.name or source),
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


def plan_by_counts(adapter: Adapter, counts: Counts, form: str) -> Plan:
    """A plan with the right widths and arbitrary units (the first ones go), for counting only."""
    paths = {}
    for (index, kind), _ in counts.items():
        groups = block_groups(adapter.blocks[index], kind, form)
        steps = tuple(zip(*groups, strict=True))
        paths[index, kind] = RemovalPath(steps, torch.zeros(len(steps), dtype=torch.float64))
    return make_plan(adapter, paths, counts, form)


def pruned_ghost(family: Family, model: DiffusionLM, plan: Plan) -> DiffusionLM:
    """A model with the plan's widths on the meta device."""
    values = set_widths(model.config.to_dict(), family, [block.widths for block in plan.blocks])
    with torch.device("meta"):
        return family.model_class(family.config_class(**values))


def _stored_dtype(directory: Path, model: DiffusionLM, values: dict, allow_pickle: bool) -> torch.dtype:
    """The weights' dtype from headers where there are any (checked against the config), else from config.json."""
    if any(WEIGHT_FILE.match(path.name) for path in directory.iterdir()) or list(directory.glob("*.index.json")):
        names = shard_names(directory, allow_pickle)
        if names[0].endswith(".safetensors"):
            headers = read_headers(directory, names)
            check_shapes(model, {name: header.shape for name, header in headers.items()}, directory)
            kinds = [DTYPES.get(header.dtype, torch.float32) for header in headers.values()]
            return max(kinds, key=kinds.count)
    return getattr(torch, str(values.get("torch_dtype") or values.get("dtype") or "bfloat16"))


def _projections(adapter: Adapter) -> int:
    return sum(block_size(block, "query_heads").total for block in adapter.blocks)


def _choice_row(adapter: Adapter, sizes, steps: int, counts: Counts, form: str) -> dict:
    widths = plan_by_counts(adapter, counts, form).blocks[sizes[0].index].widths
    return {"steps": steps, **asdict(widths), "ratio": ratio_of(sizes, counts)}


def _block_rows(before: Adapter, after: Adapter) -> list[dict]:
    rows = []
    for old, new in zip(before.blocks, after.blocks):
        totals = [block_size(block, "query_heads").total for block in (old, new)]
        row = {"index": old.index, "before": asdict(old.widths), "after": asdict(new.widths), "parameters": totals}
        rows.append(row)
    return rows
