"""Text to learn from: windows of running text, or conversations of which only the answers are learnt.

Shapes: N windows to learn from, n held out, T tokens.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from structprune.calibration.text import Conversation, Document, join_texts, read_texts, render
from structprune.calibration.windows import cut_windows, tokenize_corpus
from structprune.errors import UserError
from structprune.files import first_line
from structprune.models.tokenizer import render_chat
from structprune.recovery.settings import DataSettings

SECTION = "data"  # of the configuration, for messages


@dataclass(frozen=True, eq=False)
class RecoveryText:
    """Windows of clean ids, on CPU.

    Attributes:
        windows: (N, T) int64 to learn from. held_out: (n, T) int64, disjoint from those.
        learnt, held_out_learnt: (N, T) and (n, T) bool, tokens that may be masked; None: all.
    """

    windows: torch.Tensor
    held_out: torch.Tensor
    learnt: torch.Tensor | None = None
    held_out_learnt: torch.Tensor | None = None

    @property
    def digest(self) -> str:
        """16 hex digits of all of it."""
        result = hashlib.sha256()
        for part in (self.windows, self.held_out, self.learnt, self.held_out_learnt):
            result.update(b"-" if part is None else part.numpy().tobytes())
        return result.hexdigest()[:16]


def read_recovery_text(settings: DataSettings, tokenizer: Any, tokens: int) -> RecoveryText:
    """The windows of a source: as many as `tokens` need, or all there are, after which they repeat.

    Args:
        tokens: to learn from, in all epochs.
    Raises:
        UserError: text that cannot be read, or is too short.
    """
    documents = read_texts(settings.source, settings.subset, settings.split, settings.column, SECTION)
    first = next(documents, None)
    if first is None:
        raise UserError(f"{SECTION} text '{settings.source}' is empty")
    documents, count = chain([first], documents), -(-tokens // settings.length)
    if isinstance(first, str) or not settings.answers_only:
        return _running_text(documents, settings, tokenizer, count)
    return _conversations(documents, settings, tokenizer, count)


def _running_text(documents: Iterator[Document], settings: DataSettings, tokenizer: Any, count: int) -> RecoveryText:
    limit = (count + settings.held_out + 1) * settings.length  # one more, for the grid's offset
    ids = tokenize_corpus(join_texts(documents, settings.source, tokenizer, SECTION), tokenizer, limit)  # (M,)
    cells = len(ids) // settings.length
    _check_enough(cells, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    grid = cut_windows(ids, min(cells, count + settings.held_out), settings.length, generator)  # (N + n, T)
    edge = len(grid) - settings.held_out
    return RecoveryText(grid[:edge], grid[edge:])


def _conversations(documents: Iterator[Document], settings: DataSettings, tokenizer: Any, count: int) -> RecoveryText:
    rows, marks = [], []
    for document in documents:
        if isinstance(document, str):
            raise UserError(f"{SECTION} text '{settings.source}' mixes text and conversations: keep them apart")
        ids, learnt = answer_tokens(document, settings, tokenizer)  # (T,) each
        if learnt.any():  # a prompt may leave no room for its answer
            rows.append(ids)
            marks.append(learnt)
        if len(rows) == count + settings.held_out:
            break
    _check_enough(len(rows), settings)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))
    ids, learnt = torch.stack(rows)[order], torch.stack(marks)[order]  # (N + n, T)
    edge = len(ids) - settings.held_out
    return RecoveryText(ids[:edge], ids[edge:], learnt[:edge], learnt[edge:])


def answer_tokens(
    conversation: Conversation, settings: DataSettings, tokenizer: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """A conversation by the chat template, cut or filled with end-of-text tokens to T, and which tokens are answers.

    The filling counts as part of the last answer, as in LLaDA's fine-tuning (arXiv 2502.09992), so that a model learns
    where to stop.

    Returns:
        ids (T,) int64 and (T,) bool.
    Raises:
        UserError: no chat template, one that refuses the conversation, or one that changes what came before.
    """
    text = render(conversation, tokenizer, SECTION)
    spans = list(_answer_spans(conversation, text, tokenizer))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = torch.tensor([start for start, _ in encoded["offset_mapping"]])  # (M,) characters
    ids = torch.tensor(encoded["input_ids"], dtype=torch.long)[: settings.length]  # (M',)
    learnt = torch.zeros(len(starts), dtype=torch.bool)  # (M,)
    for start, end in spans:
        learnt |= (starts >= start) & (starts < end)
    filling = settings.length - len(ids)
    answered = conversation[-1]["role"] == "assistant"
    end_id = tokenizer.eos_token_id
    if filling and end_id is None:
        raise UserError(
            f"the tokenizer names no end-of-text token to fill answers with: set {SECTION}.answers_only=false"
        )
    ids = torch.cat((ids, torch.full((filling,), end_id or 0)))  # (T,)
    return ids, torch.cat((learnt[: settings.length], torch.full((filling,), answered)))


def _answer_spans(conversation: Conversation, text: str, tokenizer: Any) -> Iterator[tuple[int, int]]:
    """First character and end of every assistant's turn in the rendered conversation."""
    for index, turn in enumerate(conversation):
        if turn["role"] != "assistant":
            continue
        try:
            before = render_chat(tokenizer, conversation[:index], add_generation_prompt=True) if index else ""
            through = render_chat(tokenizer, conversation[: index + 1])
        except Exception as error:  # templates are programs: jinja raises what they raise
            raise UserError(
                f"the chat template refuses the first turns of a conversation alone ({first_line(error)}): set"
                f" {SECTION}.answers_only = false"
            ) from error
        if not (text.startswith(before) and text.startswith(through)):
            raise UserError(
                f"the chat template writes earlier turns anew for each answer: set {SECTION}.answers_only = false"
            )
        yield len(before), len(through)


def _check_enough(count: int, settings: DataSettings) -> None:
    """Raise UserError where a source leaves nothing to learn from beside what is held out."""
    if count <= settings.held_out:
        raise UserError(
            f"the {SECTION} text '{settings.source}' has {count} windows of {settings.length} tokens, and"
            f" {settings.held_out} are held out: give more text, or lower {SECTION}.held_out or {SECTION}.length"
        )
