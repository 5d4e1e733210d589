"""The tables of evaluations."""

from scripts.readme.readme_common import machine, ranged, table

NAMES = {
    "nelbo": "NELBO, nats/token",
    "masked_ce": "masked cross-entropy",
    "acc": "accuracy",
    "acc_norm": "accuracy per character",
}


def evaluation(results: dict) -> str:
    """A row per checkpoint, per task and metric its value and its paired difference to the first one.

    Args:
        results: of scripts/studies/evaluate_demo.py.
    """
    summary, settings = results["summary"], results["settings"]
    columns = [
        (task, metric) for task, each in summary["tasks"].items() for metric in each["metrics"] if metric != "masked_ce"
    ]
    header = ["checkpoint"]
    for task, metric in columns:
        header += [f"{task.partition(':')[0]}: {NAMES.get(metric, metric)}", "against dense"]
    rows = []
    for label, tasks in summary["checkpoints"].items():
        cells = [label]
        for task, metric in columns:
            share = summary["metrics"][metric]["proportion"]
            cells.append(_plus_minus(tasks[task]["metrics"][metric], share))
            difference = summary["differences"].get(label, {}).get(task, {}).get(metric)
            cells.append(_difference(difference, share) if difference else "")
        rows.append(cells)
    notes = []
    first = next(iter(summary["checkpoints"].values()))
    for task, each in first.items():
        own = settings["tasks"][next(iter(settings["tasks"]))][task]
        if "noise" in own:
            notes.append(
                f"{task}: {each['items']} windows of {own['length']} tokens, {own['noise']} noisy copies of each"
            )
            continue
        spent = [tasks[task]["samples"] for tasks in summary["checkpoints"].values()]
        text = (
            f"{task.partition(':')[0]}: {each['items']} questions, guidance {own['cfg_scale']},"
            f" {own['samples']} samples an answer"
        )
        if own["adaptive"]:
            text += f" at most, {sum(spent) / len(spent):.0f} on average until the choice is decided"
        notes.append(text)
    note = (
        "`python -m scripts.studies.evaluate_demo --demo DIR --piqa FILE`, from"
        " [`evaluation.json`](scripts/results/evaluation.json): value ± standard error over items; difference to the"
        f" first with its 95% interval (paired bootstrap); {'; '.join(notes)}."
    )
    return f"{table(header, rows)}\n\n{note}"


def _plus_minus(estimate: dict, share: bool) -> str:
    scale, places, unit = (100, 1, "%") if share else (1, 4, "")
    return f"{scale * estimate['value']:.{places}f}{unit} ± {scale * estimate['error']:.{places}f}"


def _difference(comparison: dict, share: bool) -> str:
    scale, places = (100, 1) if share else (1, 4)
    text = f"{scale * comparison['difference']:+.{places}f}"
    if comparison["low"] is not None:
        text += f" [{scale * comparison['low']:+.{places}f}, {scale * comparison['high']:+.{places}f}]"
    shown = comparison["verdict"] != "no difference shown"
    return f"**{text}**, {comparison['verdict']}" if shown else f"{text}, {comparison['verdict']}"


def evaluation_speed(results: dict) -> str:
    """Ours against the published loop.

    Args:
        results: of scripts/bench/bench_evaluation.py.
    """
    size, drawn, same = results["settings"], results["adaptive_samples"], results["agreement"]
    header = ["scoring", "seconds", "times faster (range over rounds)", "same choice as the full count", "normalised"]
    rows = []
    for side, seconds in results["seconds"].items():
        faster, agree = results["times_faster"].get(side), same.get(f"{side} with full")
        shares = [f"{agree[name]:.1%}" for name in ("raw", "normalised")] if agree else ["", ""]
        rows.append([side, f"{sum(seconds):.0f}", ranged(faster) if faster else "", *shares])
    z = results["deviations"]["full"]
    note = (
        f"`python -m scripts.bench.bench_evaluation --piqa FILE --threads {results['machine']['threads']}`, from"
        f" [`evaluation_speed.json`](scripts/results/evaluation_speed.json): {size['items']} questions of PIQA, the"
        f" embedded model, {size['samples']} samples an answer, guidance {size['cfg_scale']}, fp32,"
        f" {machine(results['machine'])}; the loop takes one answer at a time, 8 copies in a batch, and predicts every"
        f" position. Estimates differ from the loop's by {z['deviation']:.2f} standard errors ({z['within_2']:.0%}"
        f" within 2); adaptive sampling drew {drawn['mean']:.0f} of {drawn['full']} samples. At the full count the"
        f" loop's matrix products have {results['arithmetic']['ratio']:.2f} times the operations of ours, and a CPU's"
        " time goes to these."
    )
    return f"{table(header, rows)}\n\n{note}"
