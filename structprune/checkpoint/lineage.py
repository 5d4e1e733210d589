"""What a checkpoint went through before it is pruned or masked again, from the report.json beside its weights."""

import math
from pathlib import Path

from structprune.errors import UserError
from structprune.models.checkpoint_files import read_json

RECOVERIES, EXPORTS = "recoveries", "exports"  # in report.json, oldest first


def earlier_steps(directory: Path) -> list[dict]:
    """The steps that made a checkpoint, oldest first, as plain data; none where it has no report of ours.

    Returns:
        `step` (pruned, masked or trained back), `source`, the model that was its input or its teacher, and `share`
        removed or set to zero, or `tokens` learnt.
    """
    path = directory / "report.json"
    try:
        report = read_json(path) if path.is_file() else {}
    except UserError:  # another program's file of that name
        return []
    steps = []
    if "structprune" in report.get("versions", {}):
        masked = "sparsity" in report
        share = report["sparsity"]["total"] if masked else report["ratio"]
        made = {"step": "masked" if masked else "pruned", "source": report["source"], "share": share}
        steps = [*report.get("lineage", []), made]
    learnt = [
        {"step": "trained back", "source": each["teacher"], "tokens": each["tokens"]}
        for each in report.get(RECOVERIES, [])
        if each["kept"] != "input"
    ]
    return steps + learnt


def removed_in_all(steps: list[dict], share: float) -> float:
    """The share of the first model's weights that `steps` and one more pruning of `share` removed together.

    Shares multiply: of what a step left, the next one removes its own share. They are of the blocks that no run
    protected, so that the product is exact where all runs protect the same ones.
    """
    return 1 - (1 - share) * math.prod(1 - each["share"] for each in steps if each["step"] == "pruned")


def in_words(steps: list[dict]) -> str:
    """The steps as one phrase: `pruned from X (50.0 %), trained back against X (1,000,000 tokens)`."""
    words = {"pruned": "pruned from", "masked": "masked from", "trained back": "trained back against"}
    sizes = [f"{each['tokens']:,} tokens" if "tokens" in each else f"{100 * each['share']:.1f} %" for each in steps]
    return ", ".join(f"{words[each['step']]} `{each['source']}` ({size})" for each, size in zip(steps, sizes))
