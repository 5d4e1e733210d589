"""The table of a recovery: what the held-out text says of teacher, input and result."""

from rich.markup import escape
from rich.table import Table

from structprune.report.tables import grid

ROWS = (
    ("divergence from the teacher, nats per token", "kl", "{:.4f}"),
    ("NELBO, nats per token", "nelbo", "{:.4f}"),
    ("predictions as the teacher's", "agreement", "{:.1%}"),
    ("masked tokens right", "accuracy", "{:.1%}"),
)


def recover_table(report: dict) -> Table:
    """Figures of the teacher, and of the student before and after; changes are paired, with standard errors.

    Args:
        report: of `structprune.runs.recover.Recovery`.
    """
    table = grid(f"{report['student']}, {report['tokens']:,} tokens", "", "teacher", "before", "after", "change")
    for name, key, form in ROWS:
        cells = [form.format(report[side][key]) for side in ("teacher_figures", "before", "after")]
        change = report["change"].get(key)
        table.add_row(name, *cells, f"{change['mean']:+.4f} ± {change['standard_error']:.4f}" if change else "")
    learnt = report["learnt"]
    share = 1 - learnt["resumed_at"] / learnt["steps"]  # of the tokens, in this run's seconds
    speed = share * report["tokens"] / learnt["seconds"]
    table.caption = (
        f"{report['held_out_windows']} held-out windows; {report['seconds']:.0f} s in all, {speed:.0f} tokens/s learnt"
    )
    return table


def plan_lines(plan: dict, title: str = "predicted memory") -> list[Table | str]:
    """What a dry run predicts: steps and text, and a table of memory.

    Args:
        plan: of `structprune.runs.recovery_plan.RecoveryPlan.plan`. title: of the table.
    """
    table = grid(title, "", "GB")
    for name, size in plan["memory"].items():
        table.add_row(name, f"{size / 1e9:.2f}", style="bold" if name == "peak" else None)
    if plan["cache"]:
        table.add_row("teacher's predictions, on disk", f"{plan['cache'] / 1e9:.2f}")
    breadth = plan["breadth"]
    line = f"{plan['steps']:,} steps over {plan['tokens']:,} tokens, {breadth['epochs']:.1f} times each window"
    warnings = [] if breadth["warning"] is None else [f"[bold]Warning:[/bold] {escape(breadth['warning'])}"]
    return [table, line, *warnings]
