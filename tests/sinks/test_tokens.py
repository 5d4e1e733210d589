"""Kinds of tokens, and the tables by kind and by text."""

import pytest
import torch

from structprune.sinks.tokens import KINDS, Vocabulary, by_kind, by_token, kind_of_text

NONE = float("nan")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\n", "newline"), (".\n\n", "newline"), ("   ", "space"), ("", "space"), (" (", "punctuation"),
        ("…", "punctuation"),
        (" 42", "number"), ("3.", "number"), (" the", "word"), ("ing", "word part"), (" a1", "word"), (" é", "word"),
    ],
)  # fmt: skip
def test_kind_of_a_text(text, kind):
    assert kind_of_text(text) == kind and kind in KINDS


def test_kinds_of_the_embedded_tokenizer(tokenizer):
    vocabulary = Vocabulary(tokenizer, mask_id=2047)
    assert vocabulary.kind(2047) == "mask" and vocabulary.kind(2046) == "EOS"
    ids = tokenizer("The branch,\n")["input_ids"]
    texts = [vocabulary.text(token) for token in ids]
    assert "".join(texts) == "The branch,\n"
    assert [vocabulary.kind(token) for token in ids][-2:] == ["punctuation", "newline"]
    assert vocabulary.kind(tokenizer(" the")["input_ids"][0]) == "word"
    assert Vocabulary(tokenizer).kind(2047) == "special"


def test_shares_by_hand(tokenizer):
    mask, newline = 2047, tokenizer("\n")["input_ids"][0]
    word = tokenizer(" the")["input_ids"][0]
    ids = torch.tensor([[[mask, mask, newline, word], [mask, newline, newline, -1]]])  # (1, 2, 4)
    mass = torch.tensor([[[1.0, 1.0, 5.0, 1.0], [1.0, 4.0, 3.0, NONE]]])
    phi = torch.tensor([[[0.6, 0.1, 0.9, 0.4], [0.0, 0.7, 0.2, NONE]]])
    rows = by_kind(ids, mass, phi, Vocabulary(tokenizer, mask_id=mask))
    assert [row["kind"] for row in rows] == ["newline", "mask", "word"]
    expected = {"count": 3, "positions": 3 / 7, "mass": 12 / 16, "sinks": 2 / 3, "sink_rate": 2 / 3}
    assert {key: rows[0][key] for key in expected} == pytest.approx(expected)
    assert rows[1]["sinks"] == pytest.approx(1 / 3) and rows[2]["sinks"] == rows[2]["sink_rate"] == 0
    tokens = by_token(ids, mass, phi, Vocabulary(tokenizer, mask_id=mask), top=1)
    assert [(row["token"], row["id"]) for row in tokens] == [("\n", newline)]
    assert not by_token(ids, mass, torch.zeros_like(phi), Vocabulary(tokenizer, mask_id=mask), top=5)
