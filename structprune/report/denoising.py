"""Text on its way from all masks, for a terminal: what is revealed, what is new, and what is still masked."""

from collections.abc import Callable, Sequence
from itertools import groupby

from rich.text import Text

MASK = "░"
STYLES = {"mask": "bright_black", "new": "bold green", "old": ""}


def denoising_text(ids: Sequence[int], before: Sequence[int], mask_id: int, decode: Callable[[list[int]], str]) -> Text:
    """Tokens as text; a masked one is a shaded cell, and what was masked before is bold.

    Args:
        ids: G generated tokens. before: those one step earlier, or none.
        decode: tokens to text.
    """
    before = before or ids
    kinds = [
        "mask" if token == mask_id else "new" if earlier == mask_id else "old"
        for token, earlier in zip(ids, before, strict=True)
    ]
    text = Text()
    for kind, group in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        tokens = [token for _, token in group]
        text.append(MASK * len(tokens) if kind == "mask" else printable(decode(tokens)), STYLES[kind])
    return text


def printable(text: str) -> str:
    """Text for a terminal: characters that it would obey as their codes, except line breaks and tabs."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text
    )
