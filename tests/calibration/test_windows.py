"""Pieces, tokenisation and disjoint windows."""

import pytest
import torch

from structprune.calibration.windows import cut_windows, pieces, tokenize_corpus
from structprune.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Letters:
    """One token a character."""

    def __init__(self):
        self.seen: list[str] = []

    def __call__(self, text, add_special_tokens, return_attention_mask, verbose):
        assert add_special_tokens is False
        self.seen.append(text)
        return {"input_ids": [ord(letter) for letter in text]}


def test_pieces_are_bounded_and_lose_nothing():
    texts = ["ab cd", "", "e" * 25, "f gh " * 9, "i"]
    result = list(pieces(texts, size=10))
    assert "".join(result) == "".join(texts)
    assert max(len(piece) for piece in result) <= 20 and len(result) > 5
    assert list(pieces([], size=10)) == []
    assert list(pieces(["one two three four"], size=9)) == ["one two", " three", " four"]


def test_tokenising_stops_at_the_limit():
    read = []

    def long():
        while len(read) < 100:
            read.append(1)
            yield "x" * (1 << 17)

    tokens = tokenize_corpus(long(), Letters(), limit=(1 << 18) + 5)
    assert len(tokens) == (1 << 18) + 5 and tokens.dtype == torch.int32
    assert len(read) <= 5
    assert tokenize_corpus(iter(["ab", "", "c"]), Letters(), limit=100).tolist() == [97, 98, 99]
    assert tokenize_corpus(iter([]), Letters(), limit=100).shape == (0,)


def test_windows_are_runs_of_the_corpus_that_do_not_overlap():
    corpus = torch.arange(1003, dtype=torch.int32)
    for seed in range(20):
        result = cut_windows(corpus, 30, 33, generator(seed))  # 30 of 30 possible
        assert result.shape == (30, 33) and result.dtype == torch.int64
        assert torch.equal(result, result[:, :1] + torch.arange(33))
        assert len(result.unique()) == 30 * 33
        assert result[:, 0].tolist() != sorted(result[:, 0].tolist())


def test_windows_come_from_everywhere_at_every_offset():
    corpus = torch.arange(109)
    starts = torch.stack([cut_windows(corpus, 2, 10, generator(seed))[:, 0] for seed in range(400)])
    assert set((starts % 10).unique().tolist()) == set(range(10))
    counts = torch.bincount(starts.flatten() // 10, minlength=10)
    assert counts.min() > 40 and counts.max() < 120  # 80 expected of each


def test_the_seed_decides():
    corpus = torch.arange(500)
    one, two, other = (cut_windows(corpus, 5, 20, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_too_short_text_is_named():
    with pytest.raises(
        UserError, match=r"^the calibration text has 19 tokens, less than one window of calibration.length = 20: "
    ):
        cut_windows(torch.arange(19), 1, 20, generator())
    message = (
        "^the calibration text has 4 windows of 20 tokens, fewer than the 5 asked for: give longer text, or lower "
        "calibration.windows, calibration.held_out or calibration.length$"
    )
    with pytest.raises(UserError, match=message):
        cut_windows(torch.arange(99), 5, 20, generator())
    assert cut_windows(torch.arange(20), 1, 20, generator()).tolist() == [list(range(20))]
