"""Which tokens are sinks: kinds of tokens, tables by kind and by text. Shapes: N sequences, S steps, T positions."""

import torch

from structprune.statistics.policies import SINK

KINDS = ("mask", "BOS", "EOS", "special", "newline", "space", "punctuation", "number", "word", "word part")
WORD_STARTS = ("\u0120", "\u2581")  # what byte-level BPE and SentencePiece write for the space before a word


class Vocabulary:
    """Texts and kinds of token ids, each looked up once.

    Args:
        tokenizer: of transformers.
        mask_id: the mask token of a diffusion LM.
    """

    def __init__(self, tokenizer, mask_id: int | None = None):
        self.tokenizer, self.mask_id = tokenizer, mask_id
        self._special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        self._kinds: dict[int, str] = {}

    def text(self, token: int) -> str:
        """A token as it reads, with the space before it where it begins a word."""
        raw = self.tokenizer.convert_ids_to_tokens(token)
        text = self.tokenizer.decode([token])
        begins = isinstance(raw, str) and raw.startswith(WORD_STARTS) and not text.startswith(" ")
        return " " + text if begins else text

    def kind(self, token: int) -> str:
        """One of KINDS."""
        if token not in self._kinds:
            self._kinds[token] = self._find(token)
        return self._kinds[token]

    def _find(self, token: int) -> str:
        named = {self.mask_id: "mask", self.tokenizer.bos_token_id: "BOS", self.tokenizer.eos_token_id: "EOS"}
        if token in named:
            return named[token]
        return "special" if token in self._special else kind_of_text(self.text(token))


def kind_of_text(text: str) -> str:
    """The kind of a token by its text: a newline anywhere in it, else only spaces, else what its letters make it."""
    bare = text.strip()
    if "\n" in text:
        return "newline"
    if not bare:
        return "space"
    if not any(letter.isalnum() for letter in bare):
        return "punctuation"
    if all(letter.isdigit() or not letter.isalnum() for letter in bare):
        return "number"
    return "word" if text[0].isspace() else "word part"


def token_table(groups: torch.Tensor, mass: torch.Tensor, phi: torch.Tensor) -> dict[int, dict]:
    """What every group of tokens holds and gets, over all sequences and steps.

    Args:
        groups: (N, S, T) int64, a number for every position, such as its token's id or kind.
        mass, phi: (N, S, T); positions where the mass is NaN are left out.
    Returns:
        group -> `count` of positions, and the shares of `positions`, `mass` and `sinks` that are its, and its own
        `sink_rate`. The most sinks come first.
    """
    there = ~mass.isnan()
    sink = ((phi > SINK) & there)[there].double()  # (M,)
    names, place = groups[there].unique(return_inverse=True)  # (K,), (M,)
    count, got, sinks = (
        torch.zeros(len(names), dtype=torch.float64).index_add_(0, place, values)
        for values in (torch.ones_like(sink), mass[there].double(), sink)
    )  # 3 x (K,)
    order = sorted(range(len(names)), key=lambda k: (-sinks[k].item(), -got[k].item()))
    return {
        names[k].item(): {
            "count": int(count[k]),
            "positions": (count[k] / count.sum()).item(),
            "mass": (got[k] / got.sum()).item(),
            "sinks": (sinks[k] / sinks.sum()).item() if sinks.sum() else 0.0,
            "sink_rate": (sinks[k] / count[k]).item(),
        }
        for k in order
    }


def by_kind(ids: torch.Tensor, mass: torch.Tensor, phi: torch.Tensor, vocabulary: Vocabulary) -> list[dict]:
    """`token_table` by kind: rows with `kind`."""
    unique, place = ids.unique(return_inverse=True)
    kinds = torch.tensor([KINDS.index(vocabulary.kind(token)) if token >= 0 else 0 for token in unique.tolist()])
    return [{"kind": KINDS[kind]} | row for kind, row in token_table(kinds[place], mass, phi).items()]


def by_token(ids: torch.Tensor, mass: torch.Tensor, phi: torch.Tensor, vocabulary: Vocabulary, top: int) -> list[dict]:
    """`token_table` by token, of those `top` that are sinks most often: rows with `token` (its text) and `id`."""
    rows = token_table(ids, mass, phi).items()
    sinks = [{"token": vocabulary.text(token), "id": token} | row for token, row in rows if row["sinks"] > 0]
    return sinks[:top]


def first_position(mass: torch.Tensor, phi: torch.Tensor) -> dict:
    """The row of `token_table` of each text's first position, whatever its token is."""
    first = (torch.arange(mass.shape[-1]) == 0).long().expand(mass.shape)  # (N, S, T)
    return token_table(first, mass, phi)[1]
