"""Tables of sinks: properties of several trajectories side by side, and which tokens are sinks."""

from rich import box
from rich.table import Table

TRAJECTORIES = {"forward": "noise levels", "reverse": "generation"}
ROWS = (  # section, title, key of the summary
    ("spatial concentration", "variance of the mean mass", "spatial_variance"),
    ("", "  its std / mean mass", "spatial_variation"),
    ("", "sinks per step", "sinks_per_step"),
    ("", "attention they get, share", "mass_of_sinks"),
    ("", "heads' sinks (ε = 3), share", "votes_of_sinks"),
    ("temporal stability", "variance of the centroid", "temporal_variance"),
    ("", "  its std / positions", "drift"),
    ("", "instability (variance of φ)", "instability"),
    ("", "  of those ever a sink", "instability_of_sinks"),
    ("positions across steps", "ever a sink, positions", "ever_sinks"),
    ("", "  survival, share of steps", "survival"),
    ("", "  a sink at every step, share", "lasting"),
    ("", "kept to the next step, share", "kept"),
)


def run_title(run: dict) -> str:
    """Such as 'llada-docs, noise levels'."""
    return f"{run['model']}, {TRAJECTORIES[run['kind']]}"


def columns(runs: list[dict]) -> list[tuple[str, str, dict]]:
    """(model, trajectory, summary): a column for each trajectory, and one for the prompt of a generation."""
    entries = []
    for run in runs:
        compared = ", prompt" if run["causal"] else ""
        entries.append((run["model"], f"{TRAJECTORIES[run['kind']]}{compared}", run["summary"]))
        if "prompt_only" in run:
            entries.append((run["model"], f"{TRAJECTORIES[run['kind']]}, prompt", run["prompt_only"]))
    return entries


def cell(figure: dict) -> str:
    """Mean ± standard error over sequences; 'none' if no sequence has a value."""
    if figure["mean"] is None:
        return "none"
    mean, error = _short(figure["mean"], 3), figure["standard_error"]
    return mean if error is None else f"{mean} ± {_short(error, 1)}"


def _short(value: float, digits: int) -> str:
    """A few significant digits, and all digits before the decimal point."""
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def property_table(runs: list[dict]) -> Table:
    """Properties of sinks, one column per trajectory."""
    table = Table(title="attention sinks: mean ± standard error over sequences", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    entries = columns(runs)
    for model, trajectory, _ in entries:
        table.add_column(f"{model}\n[dim]{trajectory}[/dim]", justify="right", overflow="fold")
    for section, title, key in ROWS:
        if section:
            table.add_row(f"[bold]{section}[/bold]", *[""] * len(entries))
        table.add_row(
            title if title.startswith("  ") else f" {title}", *(cell(summary[key]) for *_, summary in entries)
        )
    table.caption = (
        f"{runs[0]['sequences']} sequences; prompt: positions whose tokens never change; for a causal LM, attention is"
        " counted per query that can see the position"
    )
    return table


def token_tables(runs: list[dict], top: int = 8) -> list[Table]:
    """For each trajectory, which kinds of tokens are sinks, and which tokens most often."""
    tables = []
    for run in runs:
        table = Table(title=f"which tokens are sinks: {run_title(run)}", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("token", "of positions", "of attention", "of sinks", "is a sink"):
            table.add_column(name, justify="left" if name == "token" else "right")
        for row in run["by_kind"]:
            table.add_row(row["kind"], *_shares(row))
        table.add_row("(the first position)", *_shares(run["first_position"]), end_section=True)
        for row in run["by_token"][:top]:
            table.add_row(repr(row["token"]), *_shares(row))
        tables.append(table)
    return tables


def _shares(row: dict) -> list[str]:
    return [f"{row[key]:.1%}" for key in ("positions", "mass", "sinks", "sink_rate")]
