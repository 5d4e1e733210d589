"""A tokenizer in the terms of GGUF: tokens with their kinds, and which of llama.cpp's ways to split text is its own."""

from pathlib import Path
from typing import Any

from structprune.errors import UserError
from structprune.models.tokenizer import load_tokenizer

PROBES = ("12345", "a\n\n\nb", "I'M")  # a number, line breaks, a contraction in capitals
# how the splits differ that llama.cpp names: pieces of every probe
SPLITS = {
    "gpt-2": (["12345"], ["a", "ĊĊ", "Ċ", "b"], ["I", "'", "M"]),
    "qwen2": (["1", "2", "3", "4", "5"], ["a", "ĊĊĊ", "b"], ["I", "'M"]),
    "llama-bpe": (["123", "45"], ["a", "ĊĊĊ", "b"], ["I", "'M"]),
    "smollm": (["1", "2", "3", "4", "5"], ["a", "ĊĊ", "Ċ", "b"], ["I", "'", "M"]),
}


class Vocabulary:
    """The tokens of a byte-pair tokenizer as GGUF has them.

    Args:
        directory: of the checkpoint. rows: of its embedding; those without a token are named as unused.
        split: the name of llama.cpp's `tokenizer.ggml.pre`; None: the one that splits text alike.
    Raises:
        UserError: no tokenizer, one that is not byte-level BPE, one with more tokens than the embedding has rows, or
            without `split` one that splits text like none that is known here.
    """

    def __init__(self, directory: Path, rows: int, split: str | None = None):
        import gguf

        tokenizer = load_tokenizer(directory)
        by_id = {number: token for token, number in tokenizer.get_vocab().items()}
        if max(by_id) >= rows:
            raise UserError(
                f"{directory}: the tokenizer's token {max(by_id)} has no row in the embedding of {rows}: give a"
                " checkpoint whose files belong together"
            )
        added, kinds = tokenizer.added_tokens_decoder, gguf.TokenType
        self.tokens = [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
        self.kinds = [
            kinds.UNUSED if number not in by_id
            else kinds.NORMAL if number not in added
            else kinds.CONTROL if added[number].special
            else kinds.USER_DEFINED
            for number in range(rows)
        ]  # fmt: skip
        backend = _byte_pair(tokenizer, directory)
        self.split = _split_of(backend, directory) if split is None else split


def _byte_pair(tokenizer: Any, directory: Path) -> Any:
    """The tokenizer's backend, if it merges bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE" or "ByteLevel" not in repr(backend.pre_tokenizer):
        raise UserError(f"{directory}: the tokenizer is not byte-level BPE, which --gguf needs: export without --gguf")
    return backend


def _split_of(backend: Any, directory: Path) -> str:
    """The name in `SPLITS` of a tokenizer's way to split text before it merges bytes."""
    pieces = tuple([piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(probe)] for probe in PROBES)
    for name, expected in SPLITS.items():
        if pieces == expected:
            return name
    raise UserError(
        f"{directory}: the tokenizer splits text like none of {', '.join(SPLITS)}: name llama.cpp's with --gguf-pre"
    )
