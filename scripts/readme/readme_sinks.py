"""The table of sinks: a diffusion LM and a causal LM side by side."""

from scripts.readme.readme_common import machine, table
from structprune.report.sink_tables import ROWS, cell, columns


def sinks(embedded: dict, causal: dict, untrained: dict, cost: dict) -> str:
    """Measured properties of sinks, one column per trajectory, and what measuring them costs.

    Args:
        embedded, causal, untrained: of scripts/studies/sink_study.py. cost: of scripts/bench/bench_sinks.py.
    """
    runs = [*embedded["runs"], *causal["runs"]]
    control = [each for each in columns(untrained["runs"]) if each[1].endswith("prompt")]
    shown = columns(runs) + control
    header = ["", *(f"{model}, {what}" for model, what, _ in shown)]
    rows = []
    for section, title, key in ROWS:
        if section:
            rows.append([f"**{section}**", *[""] * len(shown)])
        rows.append([title.strip(), *(cell(summary[key]) for *_, summary in shown)])
    size, ratio = cost["settings"], cost["ratio"]
    note = (
        f"`{embedded['command']}`, by `python -m scripts.studies.sink_study DIRECTORY`, from"
        " [`sinks_embedded.json`](scripts/results/sinks_embedded.json) and"
        " [`sinks_smollm2.json`](scripts/results/sinks_smollm2.json); untrained: random weights,"
        f" [`sinks_untrained.json`](scripts/results/sinks_untrained.json). {runs[0]['sequences']} sequences of"
        f" {runs[0]['positions']} tokens, mean ± standard error. A sink: φ > 1/2 (α = 5, κ = 2); positions are compared"
        " by mass per query that sees them. Measuring adds"
        f" {100 * (ratio['mass']['median'] - 1):.0f}% to a forward pass of {size['length']} tokens at width"
        f" {size['width']}, per head {100 * (ratio['heads']['median'] - 1):.0f}% (`python -m"
        " scripts.bench.bench_sinks`,"
        f" [`sinks_cost.json`](scripts/results/sinks_cost.json), {machine(cost['machine'])})."
    )
    return f"{table(header, rows)}\n\n{note}"
