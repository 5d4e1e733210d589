"""Text of evaluation tasks to tokens and back, with or without a chat template.

LLaDA's published evaluation adds neither BOS nor EOS. Dream's scores BOS + context, continuation + EOS, so that the
last token, which is never masked, is the EOS; that of A2D begins Llama's prompts with BOS (docs/methods.md section 6).
Shapes: P tokens of a prompt, L of a target.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from structprune.errors import UserError
from structprune.files import first_line
from structprune.models.tokenizer import encode, load_tokenizer, render_chat

INSTRUCT = re.compile(r"instruct|chat|mixcot|(?<![\d.])1\.5(?!\d)", re.IGNORECASE)  # in names of tuned checkpoints
BASE_MODEL = re.compile(r"^base_model:\s*(\S+)", re.MULTILINE)
# special tokens around scored text: those before the prompt, which a chat template replaces, and those at the end
EDGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": ((), ()),
    "bos": (("bos_token",), ()),
    "bos_eos": (("bos_token",), ("eos_token",)),
}


@dataclass(frozen=True)
class Texts:
    """How one checkpoint's texts become tokens; with `chat`, prompts go through the tokenizer's chat template."""

    tokenizer: Any
    start: tuple[int, ...] = ()  # ids before every prompt; none with a chat template, which has its own marks
    end: tuple[int, ...] = ()  # ids after every scored continuation
    chat: bool = False

    @classmethod
    def open(cls, directory: str | Path, edges: str, chat: bool = False) -> "Texts":
        """The texts of a checkpoint's directory; `edges` is a key of `EDGES`, as a family's `text_edges`.

        Raises:
            UserError: no tokenizer; `chat` without a chat template; a tokenizer without one of the special tokens.
        """
        return cls.of(load_tokenizer(directory), edges, chat)

    @classmethod
    def of(cls, tokenizer: Any, edges: str, chat: bool = False) -> "Texts":
        """The texts of a loaded tokenizer; arguments and errors as `open`."""
        if chat and not getattr(tokenizer, "chat_template", None):
            place = getattr(tokenizer, "name_or_path", "") or "the checkpoint"
            raise UserError(
                f"the tokenizer of '{place}' has no chat template: add chat_template.jinja, or do without the template"
            )
        start, end = EDGES[edges]
        start = () if chat else start
        for name in (*start, *end):
            if getattr(tokenizer, name) is None:
                sides = {"behind": start, "before": end}
                places = " and ".join(f"{side} {', '.join(names)}" for side, names in sides.items() if names)
                raise UserError(
                    f"this family's text is scored {places}, and the tokenizer names no {name}: add it to"
                    " tokenizer_config.json"
                )
        before, after = (tuple(getattr(tokenizer, f"{name}_id") for name in names) for names in (start, end))
        return cls(tokenizer, before, after, chat)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without added ones; names of special tokens in it become these tokens."""
        return encode(self.tokenizer, text)

    def prompt(self, context: str) -> torch.Tensor:
        """The tokens that generation continues, (P,) int64."""
        return torch.tensor([*self.start, *self.encode(context)], dtype=torch.long)  # (P,)

    def pair(self, context: str, continuation: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of a context and of the continuation to score, (P,) and (L,) int64.

        Spaces at the end of the context move to the continuation. Both are then encoded as one text, which is cut after
        as many tokens as the context alone has.

        Raises:
            UserError: no token remains for the continuation.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        whole, count = self.encode(stripped + continuation), len(self.encode(stripped))
        if len(whole) <= count:
            raise UserError(f"the continuation {continuation!r} adds no token to its context: nothing can be scored")
        prompt = torch.tensor([*self.start, *whole[:count]], dtype=torch.long)  # (P,)
        return prompt, torch.tensor([*whole[count:], *self.end], dtype=torch.long)  # (L,)

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text by the chat template, opened for the assistant's turn.

        Args:
            add_generation_prompt: false if the last message is the assistant's, which stays open.
        Raises:
            UserError: the template raises an error.
        """
        try:
            return render_chat(
                self.tokenizer,
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # templates are programs that may raise anything
            raise UserError(f"the chat template refuses a prompt ({first_line(error)})") from error

    def question(self, text: str) -> str:
        """A task's prompt as the model's input: unchanged, or as a user's turn with `chat`."""
        return self.render([{"role": "user", "content": text}]) if self.chat else text

    def delimiter(self, usual: str = " ") -> str:
        """The text between a prompt and an answer: nothing where the template ends the prompt."""
        return "" if self.chat else usual

    def answer(self, ids: torch.Tensor, until: Sequence[str] = ()) -> str:
        """Generated tokens as text: up to EOS or the first of the stop strings, without special tokens.

        A stop string may be a special token's name. Empty ones are ignored. `ids` are (G,) without the prompt.
        """
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        stops = [stop for stop in (*until, self.tokenizer.eos_token) if stop]
        text = text[: min((place for place in map(text.find, stops) if place >= 0), default=len(text))]
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        for name in {*self.tokenizer.all_special_tokens, *added}:
            text = text.replace(name, "")
        return text


def model_names(name: str, directory: Path | None = None) -> list[str]:
    """A checkpoint's name, and the base models that its README.md names (a pruned checkpoint's names its source)."""
    names, card = [name], None if directory is None else directory / "README.md"
    if card is not None and card.is_file():
        names += BASE_MODEL.findall(card.read_text(encoding="utf-8", errors="replace"))
    return names


def chat_warning(names: Sequence[str], has_template: bool, chat: bool) -> str | None:
    """A warning about a chat template that does not fit the checkpoint, or None.

    Whether a checkpoint was tuned on conversations is guessed from its names (Instruct, chat, 1.5, MixCoT), because
    Base checkpoints may have a chat template too. A directory of another name is taken for Base.

    Args:
        names: from `model_names`.
        has_template: whether the tokenizer has a template; chat: whether it is applied.
    """
    tuned = [name for name in names if INSTRUCT.search(name)]
    if chat and not tuned:
        return f"{names[0]} looks like a Base checkpoint by its name, but its prompts go through the chat template"
    if tuned and has_template and not chat:
        return f"{tuned[0]} looks like an Instruct checkpoint by its name: without --chat it gets unfamiliar prompts"
    if tuned and not chat:
        return f"{tuned[0]} looks like an Instruct checkpoint by its name, but has no chat template to apply"
    return None
