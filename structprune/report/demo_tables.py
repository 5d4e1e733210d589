"""The table of the demo: dense against every method."""

from itertools import groupby
from typing import cast

from rich import box
from rich.console import JustifyMethod
from rich.table import Table

OURS = "structprune"  # the method whose rows are bold
RECOVERED = "trained back"  # ours, after a recovery
UNITS = {"params": "M", "MACs": "M", "disk": "MB", "NELBO": "nats/token", "loss": "against dense", "forward": "ms"}
WIDTHS = {"method": 12, "NELBO": 11, "loss": 14}  # at least; others 5


def demo_table(rows: list[dict], dense: dict) -> Table:
    """Dense, and every method at the ratios that were saved; fits 80 columns.

    Args:
        rows, dense: as in demo.json.
    """
    title = "a small trained LLaDA, pruned: held-out text, common noise"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("ratio", "method", "params", "MACs", "disk", "NELBO", "loss", "forward", "speed"):
        unit, justify = UNITS.get(name, ""), cast(JustifyMethod, "left" if name == "method" else "right")
        width = max(len(name), len(unit), WIDTHS.get(name, 5))
        table.add_column(f"{name}\n[dim]{unit}[/dim]", justify=justify, no_wrap=True, min_width=width)
    table.add_row("0", "dense", *_cells(dense), end_section=True)
    saved = sorted((row for row in rows if "latency_ms" in row), key=lambda row: row["ratio"])
    for ratio, group in groupby(saved, key=lambda row: row["ratio"]):
        for row in group:
            table.add_row(
                f"{ratio}", row["method"], *_cells(row), style="bold" if row["method"] in (OURS, RECOVERED) else None
            )
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
