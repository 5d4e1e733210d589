"""Tables of dry runs and of finished runs."""

from collections.abc import Callable
from itertools import groupby

from rich import box
from rich.table import Table


def millions(count: float) -> str:
    """12345678 -> '12.35 M'; above a billion in B."""
    return f"{count / 1e9:.3f} B" if count >= 1e9 else f"{count / 1e6:.3f} M"


def gigabytes(count: float) -> str:
    """Bytes in decimal GB, or MB below one."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def change(before: float, after: float) -> str:
    """Relative change, such as '-30.0 %'."""
    return f"{100 * (after - before) / before:+.1f} %" if before else ""


def grid(title: str, *columns: str, gap: int = 0) -> Table:
    """A table without frame for 80 columns: names, in the first column, are folded where they are long, figures never.

    Args:
        gap: additional spaces between columns.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False)
    table.add_column(columns[0], overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _table(title: str, *columns: str, named: bool = True) -> Table:
    """A framed table of figures; with `named`, the first column is for names."""
    table = Table(title=title)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if named and index == 0 else "right")
    return table


def _add_change(table: Table, title: str, sizes: dict, show: Callable[[float], str]) -> None:
    """A row with `before`, `after` and the relative change."""
    before, after = sizes["before"], sizes["after"]
    table.add_row(title, show(before), show(after), change(before, after))


def _add_sizes(table: Table, result: dict, tokens: int) -> None:
    _add_change(table, "parameters", result["parameters"], millions)
    _add_change(table, "block projections", result["block_parameters"], millions)
    _add_change(table, f"MACs, {tokens} tokens", result["macs"], millions)


def run_table(report: dict, saved_bytes: tuple[int, int] | None = None) -> Table:
    """The closing table of a structured run: dense against pruned."""
    title = f"{report['source']}: {100 * report['ratio']:.1f} % of block projections removed"
    table = _table(title, "", "input" if report.get("lineage") else "dense", "pruned", "change")
    _add_sizes(table, report, report["macs"]["tokens"])
    if saved_bytes:
        _add_change(table, "weights on disk", dict(zip(("before", "after"), saved_bytes, strict=True)), gigabytes)
    if latency := report["latency"]:
        _add_change(table, f"ms, {workload(latency)}", latency["measured"], "{:.3f}".format)
    nelbo = report["held_out_nelbo"]
    pruned = nelbo["refit"] if nelbo["kept"] == "refit" else nelbo["plain_removal"]
    title = f"NELBO, nats/token ({nelbo['windows']} held-out windows)"
    table.add_row(title, f"{nelbo['dense']:.4f}", f"{pruned:.4f}", plus_minus(nelbo["loss"]))
    if causal := nelbo.get("causal"):
        title = "next token, nats (the same windows)"
        table.add_row(title, f"{causal['dense']:.4f}", f"{causal['pruned']:.4f}", plus_minus(causal["loss"]))
    table.caption = (
        f"kept: {nelbo['kept']} (plain removal {nelbo['plain_removal']:.4f}); "
        f"export class {report['export_class']}; {report['seconds']['total']:.1f} s; "
        f"peak memory {gigabytes(report['peak_memory_bytes']['host'])}"
    )
    if any(each["step"] == "pruned" for each in report.get("lineage", [])) and "ratio_of_dense" in report:
        first = report["lineage"][0]["source"]
        table.caption += f"\nin all {100 * report['ratio_of_dense']:.1f} % of the block projections of {first}"
    if report["sinks"]:
        table.caption += f"\n{sink_line(report)}"
    if search := report["search"]:
        gaps = " → ".join(f"{search['divergence'][name]:.4f}" for name in ("ranked", "searched"))
        table.caption += f"\nsearch: divergence {gaps} nats/token; kept: the {search['kept']} plan"
    if latency := report["latency"]:
        table.caption += f"\nlatency: target {latency['target_ms']:g} ms, predicted {latency['predicted']['after']:.3f}"
    if whole := whole_parts(report):
        table.caption += f"\nremoved as a whole: {whole}"
    return table


def workload(latency: dict) -> str:
    """The forward pass that was timed, such as 'batch 1 x 128 tokens'."""
    return f"batch {latency['batch']} x {latency['length']} tokens"


def whole_parts(report: dict) -> str:
    """What went as a whole, by the dense model's indices, such as 'blocks 2, 5; MLP of block 1'; '' if nothing."""
    parts = []
    for key, name in (("blocks", ""), ("attention", "attention of "), ("channels", "MLP of ")):
        if indices := report["removed"][key]:
            parts.append(f"{name}{'block' if len(indices) == 1 else 'blocks'} {', '.join(map(str, indices))}")
    return "; ".join(parts)


def sink_line(report: dict) -> str:
    """What a sink policy removes, such as 'sinks (all): 4.1 % of row weight removed, 8 % of it from mask tokens'."""
    sinks, trajectory = report["sinks"], report["calibration"].get("trajectory")
    policy, removed = sinks["policy"], sinks["taken"][sinks["policy"]]
    name = f"{policy}, {trajectory}" if trajectory else policy
    line = f"sinks ({name}): {100 * removed['share']:.2f} % of row weight removed"
    if removed["of_mask"] is not None:
        line += f", {100 * removed['of_mask']:.0f} % of it from mask tokens"
    if policy == "unstable":
        line += f" (policy all: {100 * sinks['taken']['all']['share']:.2f} %)"
    return line


def shown_arm(report: dict) -> str:
    """The arm of a run's score, with its sink policy if that is not the default: 'masked+sink (unstable)'."""
    policy = report["config"]["sink"]["policy"]
    return report["arm"] + (f" ({policy})" if report["arm"].endswith("+sink") and policy != "all" else "")


def mask_choice(report: dict) -> str:
    """How masks were chosen, such as 'sparsegpt on masked, 2:4, sequential, uniform'."""
    masking = report["config"]["masking"]
    arm = f" on {shown_arm(report)}" if report["arm"] else ""
    pattern = masking["nm"] if report["config"]["method"] == "nm" else f"unstructured {report['ratio']:g}"
    order = f", {masking['order']}" if report["arm"] else ""
    return f"{report['score']}{arm}, {pattern}{order}, {masking['allocation']} allocation"


def mask_table(report: dict) -> Table:
    """The closing table of a masking run: zeros by kind of projection, and NELBO."""
    title = f"{report['source']}: {100 * report['sparsity']['total']:.2f} % of its projections' weights are zero"
    table = _table(title, "projection", "lowest", "mean", "highest")
    kinds: dict[str, list[float]] = {}
    for name, value in report["sparsity"]["tensors"].items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(value)
    for kind, values in kinds.items():
        cells = (min(values), sum(values) / len(values), max(values))
        table.add_row(kind, *(f"{100 * value:.2f} %" for value in cells))
    table.caption = "\n".join(_mask_notes(report))
    return table


def _mask_notes(report: dict) -> list[str]:
    """The lines below the table of a masking run."""
    lines = [mask_choice(report)]
    base = report["config"]["masking"]["damping"]
    if dampings := [each["damping"] for each in report["factored"] if each["damping"] > base]:
        lines.append(f"damping raised to at most {max(dampings):g} for {len(dampings)} inputs")
    if unseen := report.get("unseen_experts"):
        count = sum(len(each["experts"]) for each in unseen)
        lines.append(f"{count} experts saw no token and were masked by their weights alone (report.json names them)")
    if fits := report["refit"]:
        changed = sum(fit["damping"] is not None for fit in fits)
        error = sum(fit["error"] for fit in fits) / len(fits)
        lines.append(f"refit: {changed} of {len(fits)} matrices changed, held-out output error x {error:.2f}")
        if report["held_out_nelbo"]["kept"] != "refit":
            lines.append("the refit did not improve the whole model on held-out text and was discarded")
    if nelbo := report["held_out_nelbo"]:
        loss = f"{nelbo['dense']:.4f} → {nelbo['masked']:.4f} ({plus_minus(nelbo['loss'])})"
        lines.append(f"NELBO, nats/token, {nelbo['windows']} held-out windows: {loss}")
        if causal := nelbo.get("causal"):
            change = f"{causal['dense']:.4f} → {causal['pruned']:.4f} ({plus_minus(causal['loss'])})"
            lines.append(f"next token, nats, the same windows: {change}")
    if report["sinks"]:
        lines.append(sink_line(report))
    memory = gigabytes(report["peak_memory_bytes"]["host"])
    return [*lines, f"{report['seconds']['total']:.1f} s; peak memory {memory}"]


def inspect_tables(result: dict) -> list[Table]:
    """The dry run of a structured run: totals, possible splits, widths per block, and predicted peak memory.

    Args:
        result: of `runs.inspect.inspect_checkpoint`.
    """
    title = f"{result['source']} ({result['family']}) at ratio {result['ratio']}"
    totals = _table(title, "", "before", "after", "change")
    if latency := result["latency"]:
        totals.caption = (
            f"how much goes depends on times that the run measures:\nat most {latency['target_ms']:g} ms, "
            f"{workload(latency)}; shown is ratio {result['ratio']}"
        )
    _add_sizes(totals, result, result["tokens"])
    _add_change(totals, f"weights ({result['stored_dtype']})", result["bytes"], gigabytes)
    widths = {
        "query_heads": "query heads", "kv_heads": "KV heads", "experts": "experts", "channels": "MLP channels",
        "shared": "shared channels",
    }  # fmt: skip
    widths = {key: name for key, name in widths.items() if any(row["before"].get(key) for row in result["blocks"])}
    columns = ("block", *widths.values(), "parameters")
    blocks = _table(f"units per block, {result['shown']}", *columns, named=False)
    for _, group in groupby(result["blocks"], key=lambda row: (row["before"], row["after"])):
        alike = list(group)  # neighbouring blocks with equal widths
        row, last = alike[0], alike[-1]["index"]
        name = str(last) if len(alike) == 1 else f"{row['index']}-{last}"
        cells = [f"{row['before'][key]} → {row['after'][key]}" for key in widths]
        blocks.add_row(name, *cells, " → ".join(map(millions, row["parameters"])))
    tables = [totals, _choices(result["choices"]), blocks, _memory_table(result)]
    return tables if result["search"] is None else [*tables, _search_table(result["search"])]


def _search_table(cost: dict) -> Table:
    """Operations and time of a search by part, and what it keeps: levels, if it makes any."""
    table = _table("predicted search", "", "operations", f"at {cost['rate']:.0e}/s")
    for name, operations in cost["operations"].items():
        table.add_row(name, f"{operations:.1e}", f"{cost['seconds'][name]:,.0f} s")
    if cost["disk"]:
        table.caption = f"levels on disk {gigabytes(cost['disk'])},\nmore memory {gigabytes(cost['memory'])}"
    return table


def plus_minus(difference: dict) -> str:
    """A paired difference: mean ± standard error, or the mean alone."""
    if difference["standard_error"] is None:
        return f"{difference['mean']:+.4f}, one window: no error known"
    return f"{difference['mean']:+.4f} ± {difference['standard_error']:.4f}"


def mask_inspect_tables(result: dict) -> list[Table]:
    """The dry run of masks: zeros by projection, sizes, and predicted peak memory.

    Args:
        result: of `runs.inspect.inspect_masking`.
    """
    pattern = result["pattern"] or f"unstructured {result['ratio']:g}"
    arm = f" on {result['arm']}" if result["arm"] else ""
    title = f"{result['source']} ({result['family']}): {result['score']}{arm}, {pattern}{result['rest']}"
    totals = _table(title, "projection", "weights", "zero")
    for role, counts in result["projections"].items():
        totals.add_row(role.replace("_", " "), millions(counts["weights"]), millions(counts["zero"]))
    totals.caption = (
        f"{millions(result['parameters'])} parameters before and after,\n"
        f"{gigabytes(result['bytes'])} ({result['stored_dtype']}) before and after,\n"
        f"and masks.safetensors {gigabytes(result['mask_bytes'])}"
    )
    if result["refit_operations"]:
        totals.caption += f"\nrefit: at most {result['refit_operations']:.0e} fp32 operations"
    return [totals, _memory_table(result)]


def _memory_table(result: dict) -> Table:
    """The peak by part, and what finished parts take on disk."""
    memory = _table("predicted peak memory", "", "bytes")
    memory.caption = f"finished parts on disk {gigabytes(result['work'])}"
    for name, size in result["memory"].items():
        memory.add_row(name, gigabytes(size), style="bold" if name.startswith("peak") else None)
    return memory


def _choices(rows: list[dict]) -> Table:
    title = "possible splits between heads and channels, if all blocks are alike"
    choices = _table(title, "heads removed", "query heads left", "MLP channels left", "ratio", named=False)
    for row in rows[:: max(1, len(rows) // 8)]:
        choices.add_row(str(row["steps"]), str(row["query_heads"]), str(row["channels"]), f"{row['ratio']:.4f}")
    return choices
