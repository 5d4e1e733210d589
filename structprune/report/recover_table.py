"""The table of a recovery: what the held-out text says of teacher, input and result."""

from statistics import fmean

from rich.markup import escape
from rich.table import Table

from structprune.report.tables import grid

ROWS = (
    ("divergence from the teacher, nats per token", "kl", "{:.4f}"),
    ("NELBO, nats per token", "nelbo", "{:.4f}"),
    ("divergence at next tokens, nats", "causal_kl", "{:.4f}"),
    ("next tokens, nats", "causal_ce", "{:.4f}"),
    ("predictions as the teacher's", "agreement", "{:.1%}"),
    ("masked tokens right", "accuracy", "{:.1%}"),
)


WEIGHED = (  # held-out losses, and the keys of `loss` whose product weighs each in what decides
    ("The divergence from the teacher", "kl", ("kl",)),
    ("The NELBO", "nelbo", ("cross_entropy",)),
    ("The divergence at next tokens", "causal_kl", ("kl", "causal")),
    ("The loss of next tokens", "causal_ce", ("cross_entropy", "causal")),
)
SURE = 2  # standard errors of a mean over windows that a rise must exceed


def recover_table(report: dict) -> Table:
    """Figures of the teacher, and of the student before and after; changes are paired, with standard errors.

    Args:
        report: of `structprune.runs.recover.Recovery`.
    """
    table = grid(f"{report['student']}, {report['tokens']:,} tokens", "", "teacher", "before", "after", "change")
    for name, key, form in ROWS:
        if key not in report["after"]:  # of a model that is not causal too
            continue
        cells = [form.format(report[side][key]) for side in ("teacher_figures", "before", "after")]
        change = report["change"].get(key)
        table.add_row(name, *cells, f"{change['mean']:+.4f} ± {change['standard_error']:.4f}" if change else "")
    learnt, speed = report["learnt"], ""
    if learnt["steps"]:
        share = 1 - learnt["resumed_at"] / learnt["steps"]  # of the tokens, in this run's seconds
        speed = f", {share * learnt['tokens'] / learnt['seconds']:.0f} tokens/s learnt"
    notes = [f"{report['held_out_windows']} held-out windows"]
    if blocks := report["blocks"]:
        errors = [fmean(layer[side] for layer in blocks["layers"]) for side in ("before", "after")]
        notes.append(
            f"{blocks['tokens']:,} of the tokens block by block, mean error {errors[0]:.4f} to {errors[1]:.4f}"
        )
    notes.append(f"{report['seconds']:.0f} s in all" + speed)
    table.caption = "; ".join(notes)
    return table


def no_gain(report: dict, before: str) -> list[str]:
    """A line where the weights written are not those that were learnt last, and one for each held-out loss that is
    worse than the input's.

    Args:
        before: which weights the recovery began with: "of the input".
    """
    lines = {
        "input": f"No gain on the held-out text: the weights written are those {before}.",
        "blocks": "No gain of the second stage on the held-out text: the weights written are those of the first.",
    }
    return ([lines[report["kept"]]] if report["kept"] in lines else []) + rises(report)


def rises(report: dict) -> list[str]:
    """A line for each held-out loss that rose, by more than chance would have it, while what decides fell."""
    if report["kept"] == "input":  # what was trained is not written
        return []
    lines = []
    for name, key, keys in WEIGHED:
        change = report["change"].get(key)
        if change and change["mean"] > max(5e-5, SURE * change["standard_error"]):
            weights = report["config"]["loss"]
            weight = min(keys, key=lambda each: weights[each] or 0)  # the one that holds the product down
            lines.append(
                f"{name} of the held-out text rose by {change['mean']:.4f} ± {change['standard_error']:.4f} nats per"
                f" token: raise loss.{weight} to weigh it more."
            )
    return lines


def plan_lines(plan: dict, title: str = "predicted memory", place: str = "") -> list[Table | str]:
    """What a dry run predicts: steps and text, and a table of memory.

    Args:
        plan: of `structprune.runs.recovery_plan.RecoveryPlan.plan`. title: of the table. place: what a line of steps
            begins with.
    """
    lines: list[Table | str] = []
    breadth = plan["breadth"]
    epochs = f"{breadth['epochs']:.1f} times each window"
    if first := plan["blocks"]:
        lines.append(memory_table(f"{title}, block by block", first["memory"]))
        end = " for every block, block by block" + ("" if plan["steps"] else f", {epochs}")
        lines.append(f"{place}{first['steps']:,} steps over {first['tokens']:,} tokens{end}")
    if plan["steps"]:
        disk = {"checkpoints, on disk": plan["folder"], "teacher's predictions, on disk": plan["cache"]}
        lines.append(memory_table(title, plan["memory"] | {name: size for name, size in disk.items() if size}))
        end = f"; with those, {epochs}" if first else f", {epochs}"
        lines.append(f"{place}{plan['steps']:,} steps over {plan['tokens']:,} tokens{end}")
    lines.append(cost_table("predicted time" + title.removeprefix("predicted memory"), plan["cost"]))
    warnings = [] if breadth["warning"] is None else [f"[bold]Warning:[/bold] {escape(breadth['warning'])}"]
    return lines + warnings


def cost_table(title: str, cost: dict) -> Table:
    """Operations and seconds by part, and their sums.

    Args:
        cost: of `structprune.bench.recovery_cost`.
    """
    table = grid(title, "", "operations", f"at {cost['rate']:.0e}/s")
    sums = {part: sum(cost[part].values()) for part in ("operations", "seconds")}
    for name, operations in (cost["operations"] | {"all": sums["operations"]}).items():
        seconds = sums["seconds"] if name == "all" else cost["seconds"][name]
        table.add_row(name, f"{operations:.1e}", f"{seconds:,.0f} s", style="bold" if name == "all" else None)
    return table


def memory_table(title: str, parts: dict[str, int]) -> Table:
    """Bytes by part, of which `peak` is their sum on the device."""
    table = grid(title, "", "GB")
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e9:.2f}", style="bold" if name == "peak" else None)
    return table
