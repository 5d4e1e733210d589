"""Which tokens are sinks: by kind and by text. Shapes: N sequences, S steps, T positions."""

import torch

from structprune.statistics.policies import SINK

KINDS = ("mask", "BOS", "EOS", "special", "newline", "space", "punctuation", "number", "word", "word part")
WORD_STARTS = ("\u0120", "\u2581")  # the space before a word in byte-level BPE and SentencePiece


class Vocabulary:
    """Texts and kinds of token ids.

    Args:
        tokenizer: from transformers.
        mask_id: the mask token of a diffusion LM.
    """

    def __init__(self, tokenizer, mask_id: int | None = None):
        self.tokenizer, self.mask_id = tokenizer, mask_id
        self._special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}

    def text(self, token: int) -> str:
        """A token's text, with the space before it if it begins a word."""
        raw = self.tokenizer.convert_ids_to_tokens(token)
        text = self.tokenizer.decode([token])
        begins = isinstance(raw, str) and raw.startswith(WORD_STARTS) and not text.startswith(" ")
        return " " + text if begins else text

    def kind(self, token: int) -> str:
        """One of KINDS."""
        names = {self.mask_id: "mask", self.tokenizer.bos_token_id: "BOS", self.tokenizer.eos_token_id: "EOS"}
        if token in names:
            return names[token]
        return "special" if token in self._special else kind_of_text(self.text(token))


def kind_of_text(text: str) -> str:
    """The kind of a token by its text: "newline" if it contains one, "space" if it is blank, else by its characters."""
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
    """Positions, attention and sinks of every group of tokens, over all sequences and steps.

    Args:
        groups: (N, S, T) int64, the group of every position, such as its token's id or kind.
        mass, phi: (N, S, T); positions where the mass is NaN are left out.
    Returns:
        group -> `count` of positions; the group's shares of all `positions`, `mass` and `sinks`; and `sink_rate`, the
        share of its positions that are sinks. Groups with most sinks come first.
    """
    present = ~mass.isnan()
    sink = (phi[present] > SINK).double()  # (M,)
    names, index = groups[present].unique(return_inverse=True)  # (K,), (M,)
    count, total, sinks = (
        torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, values)
        for values in (torch.ones_like(sink), mass[present].double(), sink)
    )  # 3 x (K,)
    order = sorted(range(len(names)), key=lambda k: (-sinks[k].item(), -total[k].item()))
    return {
        names[k].item(): {
            "count": int(count[k]),
            "positions": (count[k] / count.sum()).item(),
            "mass": (total[k] / total.sum()).item(),
            "sinks": (sinks[k] / sinks.sum()).item() if sinks.sum() else 0.0,
            "sink_rate": (sinks[k] / count[k]).item(),
        }
        for k in order
    }


def by_kind(ids: torch.Tensor, mass: torch.Tensor, phi: torch.Tensor, vocabulary: Vocabulary) -> list[dict]:
    """`token_table` by kind: rows with `kind`."""
    tokens, index = ids.unique(return_inverse=True)
    kinds = torch.tensor([KINDS.index(vocabulary.kind(token)) if token >= 0 else 0 for token in tokens.tolist()])
    return [{"kind": KINDS[kind]} | row for kind, row in token_table(kinds[index], mass, phi).items()]


def by_token(ids: torch.Tensor, mass: torch.Tensor, phi: torch.Tensor, vocabulary: Vocabulary, top: int) -> list[dict]:
    """`token_table` by token, for the `top` tokens with most sinks: rows with `token` (its text) and `id`."""
    rows = token_table(ids, mass, phi).items()
    sinks = [{"token": vocabulary.text(token), "id": token} | row for token, row in rows if row["sinks"] > 0]
    return sinks[:top]


def first_position(mass: torch.Tensor, phi: torch.Tensor) -> dict:
    """The row of `token_table` for the first position of each text, whatever its token."""
    first = (torch.arange(mass.shape[-1]) == 0).long().expand(mass.shape)  # (N, S, T)
    return token_table(first, mass, phi)[1]
