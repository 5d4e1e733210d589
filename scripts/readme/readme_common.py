"""What the tables of the documentation share."""


def table(header: list[str], rows: list[list[str]], others: str = "---:") -> str:
    """A Markdown table: the first column to the left, the others as `others` says, to the right by default."""
    marks = ["---"] + [others] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows))


def machine(described: dict) -> str:
    """A machine in a few words: processor, cores, torch."""
    cores = f"{described['cores']} core{'s' if described['cores'] != 1 else ''}"
    return f"{described['processor']}, {cores}, torch {described['torch']}"


def ranged(value: dict) -> str:
    """A factor with its range."""
    return f"{value['median']:.2f}x ({value['low']:.2f} to {value['high']:.2f})"
