"""What is evaluated on a checkpoint, as units of one task each, cut into chunks that can be done in any order.

A chunk is stored as a whole, and processes share the work by chunks. Its items depend on the unit alone, so that a run
can be resumed by another number of processes.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch

from structprune.errors import UserError
from structprune.evaluation import results
from structprune.evaluation.choices import Item, MonteCarlo, Scored, check_items, longest_first, score_items
from structprune.evaluation.documents import Choices, Document, Opening, Task
from structprune.evaluation.metrics import METRICS
from structprune.evaluation.nelbo import masked_nelbo
from structprune.evaluation.openings import check_openings, generate_texts
from structprune.evaluation.perturb import item_generator
from structprune.evaluation.texts import Texts
from structprune.models.encode import Batches
from structprune.models.modeling_structprune import DiffusionLM

# one window (1, T) and its random stream -> noisy ids (1, S, T) and mask probabilities (1, S)
Noise = Callable[[torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def digest(*values: Any) -> str:
    """Eight hex digits of plain values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Unit(ABC):
    """One task of one checkpoint, named `task` in tables."""

    task: str
    keys: tuple[str, ...] = field(repr=False)  # of its items, in order; two units that share a key share the item

    size: ClassVar[int]  # items in a chunk
    by_reference: ClassVar[bool] = False  # whether the reference's model runs it, once all checkpoints' others are done

    @property
    @abstractmethod
    def settings(self) -> dict:
        """Plain values that its numbers depend on."""

    @property
    def order(self) -> Sequence[int]:
        """Indices of items, as they are cut into chunks."""
        return range(len(self.keys))

    def chunks(self) -> list[tuple[int, ...]]:
        """Indices of items, chunk by chunk."""
        order = self.order
        return [tuple(order[start : start + self.size]) for start in range(0, len(order), self.size)]

    @abstractmethod
    def check(self, config: Any) -> None:
        """Raise UserError for what a model of this configuration cannot evaluate."""

    def bound(self, run: Any) -> "Unit":
        """The unit as part of a run, a `fidelity_units.Run`, where it reads what others have left."""
        return self

    def is_kept(self, indices: Sequence[int]) -> bool:
        """Whether what other units need of these items, beside their rows, is on disk."""
        return True

    @abstractmethod
    def run(self, model: DiffusionLM, indices: Sequence[int], batch: Batches) -> list[results.Row]:
        """Rows of these items."""

    @abstractmethod
    def token_ids(self) -> Iterator[torch.Tensor]:
        """The model's input for every item, (T,) each: to find out whether it was calibrated on it."""


@dataclass(frozen=True)
class TextUnit(Unit):
    """Windows of text under noise."""

    windows: torch.Tensor = field(repr=False)  # (N, T) int64
    copies: int  # S noisy ones of each
    seed: int
    noise: Noise = field(repr=False)

    size = 16

    def check(self, config: Any) -> None:
        if (self.windows == config.mask_token_id).any():
            raise UserError(f"the text '{self.task}' holds the mask token {config.mask_token_id}: remove it")

    @property
    def settings(self) -> dict:
        return {"noise": self.copies, "length": self.windows.shape[1], "items": digest(*self.keys)}

    def noised(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy copies (1, S, T) of a window, and their mask probabilities (1, S): of every checkpoint the same."""
        return self.noise(self.windows[index : index + 1], item_generator(self.seed, self.keys[index]))

    def run(self, model: DiffusionLM, indices: Sequence[int], batch: Batches) -> list[results.Row]:
        ids, keys = self.windows[list(indices)], [self.keys[index] for index in indices]  # (n, T)
        copies = zip(*map(self.noised, indices), strict=True)
        noisy, probability = (torch.cat(parts) for parts in copies)  # (n, S, T), (n, S)
        estimate = masked_nelbo(model, ids, noisy, probability, batch)
        columns = (estimate.nelbo.tolist(), estimate.masked_nats.tolist(), estimate.masked_tokens.int().tolist())
        causal = [None] * len(keys) if estimate.causal is None else estimate.causal.tolist()
        return [
            results.Window(self.task, key, nelbo, nats, tokens, self.copies, self.copies, causal_nats=nats_of_next)
            for key, nelbo, nats, tokens, nats_of_next in zip(keys, *columns, causal, strict=True)
        ]

    def token_ids(self) -> Iterator[torch.Tensor]:
        yield from self.windows


@dataclass(frozen=True)
class TaskUnit(Unit):
    """What units of documents share."""

    members: tuple[Task, ...] = field(repr=False)  # the task, or all members of a group
    documents: tuple[tuple[Task, Document], ...] = field(repr=False)  # of all members, each with its member
    shots: int | None

    def check(self, config: Any) -> None:
        """Raise UserError for a task without a metric that can be averaged, by a made-up outcome of its first item."""
        document = self.documents[0][1]
        outcome: Any = [0.0] * len(document.pairs) if isinstance(document, Choices) else ""
        if not self._metrics(0, outcome):
            names = ", ".join(self.members[0].grade(document, outcome)) or "none for a single item"
            known = ", ".join(METRICS)
            raise UserError(f"the task '{self.task}' has no metric of {known} (it has {names}): leave it out")

    def _metrics(self, index: int, outcome: Any) -> dict[str, float]:
        member, document = self.documents[index]
        grades = member.grade(document, outcome)
        return {name: value for name, value in grades.items() if name.partition(",")[0] in METRICS}


@dataclass(frozen=True)
class ChoiceUnit(TaskUnit):
    """Questions with answers to choose from."""

    items: tuple[Item, ...] = field(repr=False)
    monte_carlo: MonteCarlo

    size = 64

    @property
    def settings(self) -> dict:
        return {"shots": self.shots, **asdict(self.monte_carlo), "items": digest(*self.keys)}

    @property
    def order(self) -> list[int]:
        return longest_first(self.items)

    def check(self, config: Any) -> None:
        check_items(config, self.items, self.monte_carlo)
        super().check(config)

    def run(self, model: DiffusionLM, indices: Sequence[int], batch: Batches) -> list[results.Row]:
        scored = score_items(model, [self.items[index] for index in indices], self.monte_carlo, batch)
        return [self._row(index, each) for index, each in zip(indices, scored, strict=True)]

    def _row(self, index: int, scored: Scored) -> results.Choices:
        document, nats, samples = self.documents[index][1], scored.log_likelihoods, scored.samples
        assert isinstance(document, Choices)
        allowed, metrics = 1 if samples == 1 else self.monte_carlo.samples, self._metrics(index, nats)
        answers = (nats, scored.errors, document.lengths, document.gold)
        return results.Choices(self.task, self.keys[index], *answers, samples, allowed, metrics)

    def token_ids(self) -> Iterator[torch.Tensor]:
        for item in self.items:
            yield torch.cat((item.answers[0].prompt, item.answers[0].target))


@dataclass(frozen=True)
class GenerationUnit(TaskUnit):
    """Questions that are answered by generation."""

    texts: Texts = field(repr=False)
    options: Mapping[str, Any]  # of the family's sampler, which outrank those of the documents
    seed: int
    prompts: int  # in a forward pass

    size = 8

    @property
    def openings(self) -> tuple[Opening, ...]:
        """The documents, with keys that depend on their texts."""
        openings = [document for _, document in self.documents if isinstance(document, Opening)]
        return tuple(replace(opening, key=key) for opening, key in zip(openings, self.keys, strict=True))

    def check(self, config: Any) -> None:
        check_openings(config, self.openings, self.texts, self.options)
        super().check(config)

    @property
    def settings(self) -> dict:
        return {"shots": self.shots, "generation": dict(self.options), "items": digest(*self.keys)}

    def run(self, model: DiffusionLM, indices: Sequence[int], batch: Batches) -> list[results.Row]:
        every = self.openings
        openings = [every[index] for index in indices]
        answers = generate_texts(model, openings, self.texts, self.options, self.seed, self.prompts)
        return [
            results.Generation(self.task, opening.key, text, opening.gold, self._metrics(index, text))
            for index, opening, text in zip(indices, openings, answers, strict=True)
        ]

    def token_ids(self) -> Iterator[torch.Tensor]:
        for document in self.openings:
            yield self.texts.prompt(document.context)


def window_keys(windows: torch.Tensor) -> tuple[str, ...]:
    """Keys of windows (N, T) that are equal only for equal ones."""
    return tuple(f"{index}@{digest(window)}" for index, window in enumerate(windows.tolist()))


def document_keys(documents: Sequence[Document]) -> tuple[str, ...]:
    """Keys that are equal only for documents of equal texts."""
    return tuple(
        f"{each.key}@{digest(each.pairs if isinstance(each, Choices) else (each.context, each.gold))}"
        for each in documents
    )
