"""What the README's tables share."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, first column left, others right."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows))


def machine(found: dict) -> str:
    return f"{found['processor']}, {found['cores']} cores, torch {found['torch']}"


def ranged(value: dict) -> str:
    return f"{value['median']:.2f}x ({value['low']:.2f} to {value['high']:.2f})"
