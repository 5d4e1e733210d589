"""Windows of tokens: a corpus tokenised piece by piece, and disjoint windows drawn from it."""

from collections.abc import Iterable, Iterator

import torch

from structprune.errors import UserError
from structprune.models.tokenizer import encode

PIECE = 1 << 18  # characters tokenised at a time, so that memory does not grow with the corpus


def pieces(texts: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """The texts put together, and cut between texts, or at a blank of a longer text, into about `size` characters."""
    held: list[str] = []
    count = 0
    for text in texts:
        while len(text) > size:
            if held:
                yield "".join(held)
                held, count = [], 0
            cut = text.rfind(" ", 1, size)
            cut = size if cut < 0 else cut  # the blank goes with the word behind it, as tokenizers have it
            yield text[:cut]
            text = text[cut:]
        held.append(text)
        count += len(text)
        if count >= size:
            yield "".join(held)
            held, count = [], 0
    if held:
        yield "".join(held)


def tokenize_corpus(texts: Iterable[str], tokenizer, limit: int) -> torch.Tensor:
    """Token ids of the texts put together, without special tokens: (M,) int32, M <= `limit`; no more text is read."""
    parts: list[torch.Tensor] = []
    count = 0
    for piece in pieces(texts):
        ids = encode(tokenizer, piece)
        parts.append(torch.tensor(ids, dtype=torch.int32))
        count += len(ids)
        if count >= limit:
            break
    return torch.cat(parts)[:limit] if parts else torch.zeros(0, dtype=torch.int32)


def cut_windows(token_ids: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Windows drawn at random without replacement from a grid laid over the corpus at a random offset.

    Distinct and non-overlapping, in random order, so that the last ones are as good a held-out sample as any.

    Args:
        token_ids: (M,) integers, on CPU.
        count: number of windows, at most M // length.
        length: tokens in each.
    Returns:
        (count, length) int64.
    Raises:
        UserError: the corpus is shorter than one window, or has fewer windows.
    """
    cells = len(token_ids) // length
    if cells == 0:
        raise UserError(
            f"the calibration text has {len(token_ids):,} tokens, less than one window of calibration.length ="
            f" {length}: give longer text or lower it"
        )
    if cells < count:
        raise UserError(
            f"the calibration text has {cells} windows of {length} tokens, fewer than the {count} asked for:"
            " give longer text, or lower calibration.windows, calibration.held_out or calibration.length"
        )
    offset = torch.randint(len(token_ids) - cells * length + 1, (1,), generator=generator).item()
    grid = token_ids[offset : offset + cells * length].view(cells, length)  # (cells, T)
    return grid[torch.randperm(cells, generator=generator)[:count]].long()  # (count, T)
