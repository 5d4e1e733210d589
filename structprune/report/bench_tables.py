"""Tables of a benchmark: each model compared with the first."""

from collections.abc import Callable

from rich.table import Table

from structprune.report.tables import gigabytes, grid, millions

Rows = list[dict]


def bench_tables(result: dict) -> list[Table]:
    """Models, forward passes, generations and 2:4 kernels, those that were measured.

    Args:
        result: the contents of bench.json.
    """
    tables = [_models(result["models"]), _forward(result["forward"])]
    if result["generation"]:
        tables.append(_generation(result["generation"], result["settings"]["sampler"]))
    if result["semi_structured"] and not result["semi_structured"]["refused"]:
        tables += [_kernels(label, rows) for label, rows in result["semi_structured"]["models"].items()]
    return tables


def _models(rows: Rows) -> Table:
    table = grid("models", "model", "removed", "parameters", "weights", "dtype", gap=1)
    for row in rows:
        sizes = (millions(row["parameters"]), gigabytes(row["bytes"]), row["dtype"])
        table.add_row(row["model"], f"{100 * row['removed']:.1f} %", *sizes)
    table.caption = "removed: share of the first model's block projections"
    return table


def _forward(rows: Rows) -> Table:
    table = grid("forward pass", "model", "ms (quartiles)", "speed", "MACs", "of ideal", "peak above", gap=1)
    _add_groups(table, rows, lambda row: (_quartiles(row["ms"]), *_gain(row), _bytes(row["peak_above_weights"])))
    table.caption = (
        "logits at all positions; of ideal: (1 - 1 / speed-up) / (share of MACs removed), including attention and LM"
        " head; peak above: memory beyond the weights and all else held before the pass"
    )
    return table


def _generation(rows: Rows, sampler: dict) -> Table:
    block = f", blocks of {sampler['block_length']}" if "block_length" in sampler else ""
    title = f"generation, {sampler['gen_length']} tokens in {sampler['steps']} steps{block}"
    table = grid(title, "model", "tokens/s", "speed", "MACs", "of ideal", "equal", "peak", gap=1)

    def cells(row: dict) -> tuple[str, ...]:
        equal = "" if row["agreement"] is None else f"{100 * row['agreement']:.0f} %"
        return _quartiles(_rates(row)), *_gain(row), equal, _bytes(row["peak_above_weights"])

    _add_groups(table, rows, cells)
    table.caption = "tokens/s: generated tokens, with quartiles; peak: memory beyond what was held before"
    if any(row["agreement"] is not None for row in rows):
        table.caption += (
            "; prefix, dual: with that cache; equal: share of tokens equal to the same model's without a cache, on"
            " random prompts"
        )
    caches = {row["cache"] for row in rows}
    if "prefix" in caches and "dual" not in caches and sampler.get("block_length") == sampler["gen_length"]:
        table.caption += "; in a single block a dual cache does what a prefix cache does"
    return table


def _kernels(label: str, rows: dict) -> Table:
    table = grid(f"{label}: 2:4 kernels", "layers", "tokens", "out x in", "dense ms", "2:4 ms", "speed", gap=1)
    for row in rows["shapes"]:
        name = f"{row['layers']} as {row['first'].rpartition('.')[2]}"  # such as '32 as q_proj'
        figures = ("refused", "", "") if "refused" in row else _pair(row)
        table.add_row(name, str(row["tokens"]), f"{row['outputs']}x{row['inputs']}", *figures)
    table.add_section()
    for row in rows["forward"]:
        layers = "" if row["layers"] == row["of_layers"] else f"{row['layers']} of {row['of_layers']}"  # on kernels
        table.add_row("whole pass", f"{row['batch']} x {row['length']}", layers, *_pair(row))
    notes = sorted({row["refused"] for row in rows["shapes"] if "refused" in row})
    if rows["forward"]:
        difference = max(row["relative_difference"] for row in rows["forward"])
        notes.append(f"relative difference of the logits: {difference:.1g}")
    table.caption = "; ".join(notes) or None
    return table


def _pair(row: dict) -> tuple[str, str, str]:
    return _quartiles(row["dense_ms"]), _quartiles(row["2:4_ms"]), f"{row['speedup']['median']:.2f}x"


def _add_groups(table: Table, rows: Rows, cells: Callable[[dict], tuple[str, ...]]) -> None:
    """A section for each size, cache and mode, such as '1 x 512, prefix', with a row of `cells` for each model."""
    groups: dict[str, Rows] = {}
    for row in rows:
        parts = [f"{row['batch']} x {row['length']}", row.get("cache", "none"), row["mode"]]
        groups.setdefault(", ".join(part for part in parts if part not in ("none", "eager")), []).append(row)
    for title, group in groups.items():
        table.add_section()
        table.add_row(title, style="bold")
        for row in group:
            table.add_row(f"  {row['model']}", *cells(row))


def _number(value: float) -> str:
    """About three digits, without an exponent."""
    digits = next((digits for digits, least in enumerate((100, 10, 1)) if value >= least), 3)
    return f"{value:.{digits}f}"


def _quartiles(values: dict) -> str:
    return f"{_number(values['median'])} ({_number(values['p25'])}-{_number(values['p75'])})"


def _rates(row: dict) -> dict[str, float]:
    """Tokens per second; the upper quartile of times gives the lower quartile of rates."""
    work = row["tokens_per_second"] * row["ms"]["median"]
    return {"median": row["tokens_per_second"], "p25": work / row["ms"]["p75"], "p75": work / row["ms"]["p25"]}


def _gain(row: dict) -> tuple[str, str, str]:
    """Speed-up, change of MACs (for the first model: its MACs) and share of the ideal saving."""
    if "speedup" not in row:
        return "", _macs(row["macs"]), ""
    share = row["ideal_share"]
    reached = "" if share is None else f"{100 * share['median']:.1f} %"
    return f"{row['speedup']['median']:.2f}x", f"{-100 * row['macs_removed']:+.1f} %", reached


def _macs(count: int) -> str:
    return f"{_number(count / 1e9)} G" if count >= 1e9 else f"{_number(count / 1e6)} M"


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else gigabytes(count)
