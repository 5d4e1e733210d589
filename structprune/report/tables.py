"""Rich tables of what a run will do and what it did."""

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


def run_table(report: dict, saved_bytes: tuple[int, int] | None = None) -> Table:
    """The closing table of a run: dense against pruned."""
    table = Table(title=f"{report['source']}: {100 * report['ratio']:.1f} % of block projections removed")
    for name in ("", "dense", "pruned", "change"):
        table.add_column(name, justify="left" if not name else "right")

    def row(title: str, before: float, after: float, show) -> None:
        table.add_row(title, show(before), show(after), change(before, after))

    row("parameters", report["parameters"]["before"], report["parameters"]["after"], millions)
    row("block projections", report["block_parameters"]["before"], report["block_parameters"]["after"], millions)
    macs = report["macs"]
    row(f"MACs, {macs['tokens']} tokens", macs["before"], macs["after"], millions)
    if saved_bytes:
        row("weights on disk", *saved_bytes, gigabytes)
    nelbo = report["held_out_nelbo"]
    dense, loss = nelbo["dense"], nelbo["loss"]
    kept = nelbo["refit"] if nelbo["kept"] == "refit" else nelbo["plain_removal"]
    error = plus_minus(loss)
    table.add_row(f"NELBO, nats/token ({nelbo['windows']} held-out windows)", f"{dense:.4f}", f"{kept:.4f}", error)
    table.caption = (
        f"kept: {nelbo['kept']} (plain removal {nelbo['plain_removal']:.4f}); "
        f"export class {report['export_class']}; {report['seconds']['total']:.1f} s; "
        f"peak memory {gigabytes(report['peak_memory_bytes']['host'])}"
    )
    if report["sinks"]:
        table.caption += f"\n{sink_line(report)}"
    return table


def sink_line(report: dict) -> str:
    """What a sink policy took, such as 'sinks (all): 4.1 % of row weight taken, 8 % of it from mask tokens'."""
    sinks, trajectory = report["sinks"], report["calibration"].get("trajectory")
    policy, found = sinks["policy"], sinks["taken"][sinks["policy"]]
    line = (
        f"sinks ({policy}{f', {trajectory}' if trajectory else ''}): {100 * found['share']:.2f} % of row weight taken"
    )
    if found["of_mask"] is not None:
        line += f", {100 * found['of_mask']:.0f} % of it from mask tokens"
    if policy == "unstable":
        line += f" (all would take {100 * sinks['taken']['all']['share']:.2f} %)"
    return line


def shown_arm(report: dict) -> str:
    """The arm of a run's score, with a sink policy that is not the default: 'masked+sink (unstable)'."""
    policy = report["config"]["sink"]["policy"]
    return report["arm"] + (f" ({policy})" if report["arm"].endswith("+sink") and policy != "all" else "")


def mask_choice(report: dict) -> str:
    """How masks were chosen, such as 'sparsegpt on masked, 2:4, sequential, uniform'."""
    masking = report["config"]["masking"]
    seen = f" on {shown_arm(report)}" if report["arm"] else ""
    pattern = masking["nm"] if report["config"]["method"] == "nm" else f"unstructured {report['ratio']:g}"
    order = f", {masking['order']}" if report["arm"] else ""
    return f"{report['score']}{seen}, {pattern}{order}, {masking['allocation']} allocation"


def mask_table(report: dict) -> Table:
    """The closing table of a run that made masks: zeros by kind of projection, and NELBO."""
    total = report["sparsity"]["total"]
    table = Table(title=f"{report['source']}: {100 * total:.2f} % of its projections' weights are zero")
    for name in ("projection", "lowest", "mean", "highest"):
        table.add_column(name, justify="left" if name == "projection" else "right")
    kinds: dict[str, list[float]] = {}
    for name, value in report["sparsity"]["tensors"].items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(value)
    for kind, values in kinds.items():
        cells = (min(values), sum(values) / len(values), max(values))
        table.add_row(kind, *(f"{100 * value:.2f} %" for value in cells))
    lines = [mask_choice(report)]
    if raised := [each for each in report["factored"] if each["damping"] > report["config"]["masking"]["damping"]]:
        lines.append(f"damping raised to at most {max(each['damping'] for each in raised):g} for {len(raised)} inputs")
    if fits := report["refit"]:
        changed = sum(fit["damping"] is not None for fit in fits)
        error = sum(fit["error"] for fit in fits) / len(fits)
        lines.append(f"refit: {changed} of {len(fits)} matrices changed, held-out output error x {error:.2f}")
        if report["held_out_nelbo"]["kept"] != "refit":
            lines.append("... which was no gain for the whole model on held-out text: left out")
    if nelbo := report["held_out_nelbo"]:
        error = plus_minus(nelbo["loss"])
        shown = f"{nelbo['dense']:.4f} → {nelbo['masked']:.4f} ({error})"
        lines.append(f"NELBO, nats/token, {nelbo['windows']} held-out windows: {shown}")
    if report["sinks"]:
        lines.append(sink_line(report))
    lines.append(f"{report['seconds']['total']:.1f} s; peak memory {gigabytes(report['peak_memory_bytes']['host'])}")
    table.caption = "\n".join(lines)
    return table


def inspect_tables(found: dict) -> list[Table]:
    """The dry run's tables: totals, what the split can choose from, blocks, and predicted peak memory."""
    totals = Table(title=f"{found['source']} ({found['family']}) at ratio {found['ratio']}")
    for name in ("", "before", "after", "change"):
        totals.add_column(name, justify="left" if not name else "right")
    for title, key, show in (
        ("parameters", "parameters", millions),
        ("block projections", "block_parameters", millions),
        (f"MACs, {found['tokens']} tokens", "macs", millions),
        (f"weights ({found['stored_dtype']})", "bytes", gigabytes),
    ):
        before, after = found[key]["before"], found[key]["after"]
        totals.add_row(title, show(before), show(after), change(before, after))
    blocks = Table(title=f"units per block, {found['shown']}")
    for name in ("block", "query heads", "KV heads", "MLP channels", "parameters"):
        blocks.add_column(name, justify="right")
    for first, last, row in _runs(found["blocks"]):
        cells = [f"{row['before'][key]} → {row['after'][key]}" for key in ("query_heads", "kv_heads", "channels")]
        name = str(first) if first == last else f"{first}-{last}"
        blocks.add_row(name, *cells, " → ".join(map(millions, row["parameters"])))
    return [totals, _choices(found), blocks, _memory_table(found["memory"])]


def plus_minus(difference: dict) -> str:
    """A paired difference in words: mean ± standard error, or the mean alone."""
    if difference["standard_error"] is None:
        return f"{difference['mean']:+.4f}, one window: no error known"
    return f"{difference['mean']:+.4f} ± {difference['standard_error']:.4f}"


def mask_inspect_tables(found: dict) -> list[Table]:
    """The dry run of masks: zeros by projection, sizes, and predicted peak memory."""
    pattern = found["pattern"] or f"unstructured {found['ratio']:g}"
    seen = f" on {found['arm']}" if found["arm"] else ""
    totals = Table(title=f"{found['source']} ({found['family']}): {found['score']}{seen}, {pattern}{found['rest']}")
    for name in ("projection", "weights", "zero"):
        totals.add_column(name, justify="left" if name == "projection" else "right")
    for role, counts in found["projections"].items():
        totals.add_row(role.replace("_", " "), millions(counts["weights"]), millions(counts["zero"]))
    totals.caption = (
        f"{millions(found['parameters'])} parameters before and after,\n"
        f"{gigabytes(found['bytes'])} ({found['stored_dtype']}) before and after,\n"
        f"and masks.safetensors {gigabytes(found['mask_bytes'])}"
    )
    if found["refit_operations"]:
        totals.caption += f"\nrefit: at most {found['refit_operations']:.0e} fp32 operations"
    return [totals, _memory_table(found["memory"])]


def _memory_table(parts: dict[str, int]) -> Table:
    memory = Table(title="predicted peak memory")
    memory.add_column("")
    memory.add_column("bytes", justify="right")
    for name, size in parts.items():
        memory.add_row(name, gigabytes(size), style="bold" if name.startswith("peak") else None)
    return memory


def _runs(rows: list[dict]) -> list[tuple[int, int, dict]]:
    """Neighbouring blocks with equal widths as (first, last, their row)."""
    runs: list[tuple[int, int, dict]] = []
    for row in rows:
        if runs and (runs[-1][2]["before"], runs[-1][2]["after"]) == (row["before"], row["after"]):
            runs[-1] = (runs[-1][0], row["index"], runs[-1][2])
        else:
            runs.append((row["index"], row["index"], row))
    return runs


def _choices(found: dict) -> Table:
    choices = Table(title="what the split can choose from, were all blocks alike")
    for name in ("heads removed", "query heads left", "MLP channels left", "ratio"):
        choices.add_column(name, justify="right")
    rows = found["choices"]
    for row in rows[:: max(1, len(rows) // 8)]:
        choices.add_row(str(row["steps"]), str(row["query_heads"]), str(row["channels"]), f"{row['ratio']:.4f}")
    return choices
