"""The printed tables of the study of a checkpoint."""

from statistics import fmean

from rich.table import Table

from scripts.studies.studies import cell

GENERATION = ("tokens_kept", "generated_nelbo")  # figures of generated text


def tables(result: dict) -> list[Table]:
    """For every text: loss, KL and agreement of every variant, and the paired differences; then generation.

    Args:
        result: what checkpoint_study.py summarises.
    """
    pairs = [(_loss_table(result, text), _contrast_table(result, text)) for text in result["dense"]]
    generation = [_generation_table(result["generation"])] if "generation" in result else []
    return [*(table for pair in pairs for table in pair), *generation]


def rows_of_text(result: dict, part: str, text: str, *keys: str) -> dict[tuple, dict[str, dict]]:
    """The rows of one text as `{values of keys: {ratio: row}}`, in their order."""
    rows: dict[tuple, dict[str, dict]] = {}
    for row in result[part]:
        if row["text"] == text:
            rows.setdefault(tuple(row[key] for key in keys), {})[row["ratio"]] = row
    return rows


def _loss_table(result: dict, text: str) -> Table:
    table = Table(title=f"{text}: loss of NELBO against dense, nats per token [95% interval over seeds]")
    table.add_column("variant")
    rows = rows_of_text(result, "losses", text, "variant")
    for ratio in next(iter(rows.values())):
        for title in (f"loss at {ratio}", "KL", "agreement", "heads gone"):
            table.add_column(title, justify="right")
    for (name,), by_ratio in rows.items():
        cells = []
        for row in by_ratio.values():
            heads = ", ".join(map(str, row["heads_removed"]))
            cells += [cell(row), f"{fmean(row['kl']):.3f}", f"{100 * fmean(row['agreement']):.1f} %", heads]
        table.add_row(name, *cells)
    return table


def _contrast_table(result: dict, text: str) -> Table:
    table = Table(title=f"{text}: paired difference of losses; * excludes 0, all seeds agree")
    rows = rows_of_text(result, "contrasts", text, "variant", "against")
    for title in ("variant", "against"):
        table.add_column(title)
    for ratio in next(iter(rows.values())):
        table.add_column(ratio, justify="right")
    for names, by_ratio in rows.items():
        table.add_row(*names, *(cell(row, paired=True) for row in by_ratio.values()))
    return table


def _generation_table(generation: dict) -> Table:
    table = Table(title=f"Generated text; the dense model's own has {fmean(generation['dense']):.2f} nats per token")
    for title in ("variant", "ratio", "tokens kept", "NELBO under the dense model"):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for row in generation["rows"]:
        share, nelbo = (fmean(row[key]) for key in GENERATION)
        table.add_row(row["variant"], row["ratio"], f"{100 * share:.1f} %", f"{nelbo:.2f}")
    return table
