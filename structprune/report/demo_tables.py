"""The table of the demo: dense against every method."""

from itertools import groupby

from rich import box
from rich.table import Table

OURS = "structprune"  # the method whose rows are bold


def demo_table(rows: list[dict], dense: dict) -> Table:
    """Dense, and every method at the ratios that were saved; fits 80 columns.

    Args:
        rows, dense: as in demo.json.
    """
    table = Table(
        title="a small trained LLaDA, pruned: held-out text, common noise",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    columns = ("ratio", "method", "params", "MACs", "disk", "NELBO", "loss", "forward", "speed")
    units = ("", "", "M", "M", "MB", "nats/token", "against dense", "ms", "")
    for name, unit in zip(columns, units, strict=True):
        width = max(len(name), len(unit), 11 if name in ("method", "NELBO") else 14 if name == "loss" else 5)
        table.add_column(
            f"{name}\n[dim]{unit}[/dim]",
            justify="left" if name == "method" else "right",
            no_wrap=True,
            min_width=width,
        )
    table.add_row("0", "dense", *_cells(dense), end_section=True)
    saved = sorted((row for row in rows if "latency_ms" in row), key=lambda row: row["ratio"])
    for ratio, group in groupby(saved, key=lambda row: row["ratio"]):
        for row in group:
            table.add_row(f"{ratio}", row["method"], *_cells(row), style="bold" if row["method"] == OURS else None)
        table.add_section()
    table.caption = (
        f"NELBO ± standard error over {dense['windows']} windows of {dense['length']} tokens; loss: paired difference;"
        f" forward: median latency of 16 windows"
    )
    return table


def _cells(row: dict) -> list[str]:
    loss, speed = row.get("loss"), row.get("speedup", {"median": 1.0})
    return [
        f"{row['parameters'] / 1e6:.2f}",
        f"{row['macs'] / 1e6:.0f}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['nelbo']:.2f} ± {row['standard_error']:.2f}",
        f"{loss['mean']:+.3f} ± {loss['standard_error']:.3f}" if loss else "",
        f"{row['latency_ms']:.0f}",
        f"{speed['median']:.2f}x",
    ]
