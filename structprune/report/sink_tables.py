"""Tables of sinks: the properties of several trajectories side by side, and which tokens are sinks."""

from rich import box
from rich.table import Table

KINDS = {"forward": "noise levels", "reverse": "generation"}
ROWS = (  # section, title, key of the summary
    ("spatial concentration", "variance of the mean mass over positions", "spatial_variance"),
    ("", "its standard deviation / mean mass", "spatial_variation"),
    ("", "sinks per step", "sinks_per_step"),
    ("", "share of the attention they get", "mass_of_sinks"),
    ("", "share of the heads they are a sink of (ε = 3)", "votes_of_sinks"),
    ("temporal stability", "variance of the centroid, positions²", "temporal_variance"),
    ("", "its standard deviation / positions", "drift"),
    ("", "instability: variance of φ, all positions", "instability"),
    ("", "instability of positions that are ever a sink", "instability_of_sinks"),
    ("positions across steps", "positions that are ever a sink", "ever_sinks"),
    ("", "share of the steps that one of them is", "survival"),
    ("", "share of them that are at every step", "lasting"),
    ("", "share of sinks kept to the next step", "kept"),
)


def run_title(run: dict) -> str:
    """Such as 'llada-docs, noise levels'."""
    return f"{run['model']}, {KINDS[run['kind']]}"


def columns(runs: list[dict]) -> list[tuple[str, str, dict]]:
    """Model, what was measured, and its summary: a column for each trajectory, and one for a generation's prompt."""
    found = []
    for run in runs:
        compared = ", prompt" if run["causal"] else ""
        found.append((run["model"], f"{KINDS[run['kind']]}{compared}", run["summary"]))
        if "prompt_only" in run:
            found.append((run["model"], f"{KINDS[run['kind']]}, prompt", run["prompt_only"]))
    return found


def cell(figure: dict) -> str:
    """Mean ± standard error over sequences; 'none' where no sequence has one."""
    if figure["mean"] is None:
        return "none"
    shown = _number(figure["mean"])
    return shown if figure["standard_error"] is None else f"{shown} ± {_number(figure['standard_error'])}"


def _number(value: float) -> str:
    return (
        f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 0.001 or not value else f"{value:.0e}"
    )


def property_table(runs: list[dict]) -> Table:
    """The measured properties of sinks, one column per trajectory."""
    table = Table(title="attention sinks: mean ± standard error over sequences", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    found = columns(runs)
    for model, what, _ in found:
        table.add_column(f"{model}\n[dim]{what}[/dim]", justify="right")
    for section, title, key in ROWS:
        if section:
            table.add_row(f"[bold]{section}[/bold]")
        table.add_row(f"  {title}", *(cell(summary[key]) for *_, summary in found))
    first = runs[0]
    table.caption = f"{first['sequences']} sequences; 'prompt': at the positions whose tokens never change"
    return table


def token_tables(runs: list[dict], top: int = 8) -> list[Table]:
    """Per trajectory, what kinds of tokens are sinks, and which tokens are so most often."""
    tables = []
    for run in runs:
        table = Table(title=f"which tokens are sinks: {run_title(run)}", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("token", "of positions", "of attention", "of sinks", "is a sink"):
            table.add_column(name, justify="left" if name == "token" else "right")
        for row in run["by_kind"]:
            table.add_row(row["kind"], *_shares(row))
        table.add_section()
        for row in run["by_token"][:top]:
            table.add_row(repr(row["token"]), *_shares(row))
        tables.append(table)
    return tables


def _shares(row: dict) -> list[str]:
    return [f"{row[key]:.1%}" for key in ("positions", "mass", "sinks", "sink_rate")]
