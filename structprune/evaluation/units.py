"""What is evaluated on a checkpoint, as units of one task each, cut into chunks that can be done in any order.

A chunk is what is kept when a run is killed, and what processes share out. Which items it has depends on the unit
alone, so that a run can be taken up again by another number of processes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from structprune.errors import UserError
from structprune.evaluation import results
from structprune.evaluation.choices import Item, MonteCarlo, score_items
from structprune.evaluation.documents import Choices, Document, Opening, Task
from structprune.evaluation.nelbo import masked_nelbo
from structprune.evaluation.openings import complete
from structprune.evaluation.perturb import item_generator
from structprune.evaluation.texts import Texts
from structprune.models.encode import Batches
from structprune.models.modeling_structprune import DiffusionLM

Noise = Callable[[torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
WINDOWS, ITEMS, GENERATIONS = 16, 64, 8  # of a chunk


class Unit(Protocol):
    """One task of one checkpoint.

    Attributes:
        task: its name in tables.
        keys: of its items, in order; two units with a key in common have the same item.
        settings: plain values that its numbers depend on.
    """

    task: str
    keys: tuple[str, ...]
    settings: dict

    def chunks(self) -> list[tuple[int, ...]]:
        """Indices of items, chunk by chunk."""

    def run(self, model: DiffusionLM, chosen: Sequence[int], batch: Batches) -> list[results.Row]:
        """Rows of these items."""

    def token_ids(self) -> Iterator[torch.Tensor]:
        """What the model sees of every item, (T,) each: to find out whether it was calibrated on it."""


def digest(*values: Any) -> str:
    """Eight hex digits of plain values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class TextUnit:
    """Windows of text under noise.

    Attributes:
        windows: (N, T) int64.
        copies: S noisy ones of each.
        noise: one window (1, T) and its own stream -> noisy ids (1, S, T) and mask probabilities (1, S).
    """

    task: str
    windows: torch.Tensor
    copies: int
    seed: int
    noise: Noise = field(repr=False)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(f"{index}@{digest(window)}" for index, window in enumerate(self.windows.tolist()))

    @property
    def settings(self) -> dict:
        return {"noise": self.copies, "length": self.windows.shape[1], "items": digest(*self.keys)}

    def chunks(self) -> list[tuple[int, ...]]:
        count = len(self.windows)
        return [tuple(range(start, min(start + WINDOWS, count))) for start in range(0, count, WINDOWS)]

    def run(self, model: DiffusionLM, chosen: Sequence[int], batch: Batches) -> list[results.Row]:
        ids, keys = self.windows[list(chosen)], [self.keys[index] for index in chosen]  # (n, T)
        noisy = [self.noise(window[None], item_generator(self.seed, key)) for window, key in zip(ids, keys)]
        found = masked_nelbo(model, ids, *(torch.cat(parts) for parts in zip(*noisy)), batch=batch)
        columns = (keys, found.nelbo.tolist(), found.masked_nats.tolist(), found.masked_tokens.int().tolist())
        return [results.Window(self.task, *values, self.copies, self.copies) for values in zip(*columns)]

    def token_ids(self) -> Iterator[torch.Tensor]:
        yield from self.windows


@dataclass(frozen=True)
class _OfTasks:
    """What units of documents have in common.

    Attributes:
        members: the task, or all members of a group.
        documents: of all members, and for each its member.
    """

    task: str
    members: tuple[Task, ...] = field(repr=False)
    documents: tuple[tuple[Task, Document], ...] = field(repr=False)
    keys: tuple[str, ...] = field(repr=False)
    shots: int | None

    def check_metrics(self) -> None:
        """Raise UserError where a task grades in no way that we can average, by a made-up outcome of its first item."""
        document = self.documents[0][1]
        outcome = [0.0] * len(document.pairs) if isinstance(document, Choices) else ""
        if not self._metrics(0, outcome):
            names = ", ".join(self.members[0].grade(document, outcome)) or "none for a single item"
            known = ", ".join(results.METRICS)
            raise UserError(f"the task '{self.task}' has no metric of {known} (it has {names}): leave it out")

    def _metrics(self, index: int, outcome) -> dict[str, float]:
        member, document = self.documents[index]
        found = member.grade(document, outcome)
        return {name: value for name, value in found.items() if name.partition(",")[0] in results.METRICS}


@dataclass(frozen=True)
class ChoiceUnit(_OfTasks):
    """Questions with answers to choose from."""

    items: tuple[Item, ...] = field(repr=False)
    monte_carlo: MonteCarlo

    @property
    def settings(self) -> dict:
        return {"shots": self.shots, **asdict(self.monte_carlo), "items": digest(*self.keys)}

    def chunks(self) -> list[tuple[int, ...]]:
        """Items of like length together, the longest first, so that forward passes fill and the time left is known."""
        longest = [max(len(a.prompt) + len(a.target) for a in item.answers) for item in self.items]
        order = sorted(range(len(self.items)), key=lambda index: -longest[index])
        return [tuple(order[start : start + ITEMS]) for start in range(0, len(order), ITEMS)]

    def run(self, model: DiffusionLM, chosen: Sequence[int], batch: Batches) -> list[results.Row]:
        scored = score_items(model, [self.items[index] for index in chosen], self.monte_carlo, batch)
        rows = []
        for index, found in zip(chosen, scored):
            document = self.documents[index][1]
            full = 1 if found.samples == 1 else self.monte_carlo.samples
            rows.append(
                results.Choices(
                    self.task,
                    self.keys[index],
                    found.log_likelihoods,
                    found.errors,
                    document.lengths,
                    document.gold,
                    found.samples,
                    full,
                    self._metrics(index, found.log_likelihoods),
                )  # fmt: skip
            )
        return rows

    def token_ids(self) -> Iterator[torch.Tensor]:
        for item in self.items:
            yield torch.cat((item.answers[0].prompt, item.answers[0].target))


@dataclass(frozen=True)
class GenerationUnit(_OfTasks):
    """Questions that are answered by generation.

    Attributes:
        options: of the family's sampler, which outrank those of the documents.
        prompts: of a chunk that are generated from together.
    """

    texts: Texts = field(repr=False)
    options: Mapping[str, Any]
    seed: int
    prompts: int

    @property
    def openings(self) -> tuple[Opening, ...]:
        """The documents, with keys that stand for their texts."""
        return tuple(replace(document, key=key) for (_, document), key in zip(self.documents, self.keys))

    @property
    def settings(self) -> dict:
        return {"shots": self.shots, "generation": dict(self.options), "items": digest(*self.keys)}

    def chunks(self) -> list[tuple[int, ...]]:
        count = len(self.documents)
        return [tuple(range(start, min(start + GENERATIONS, count))) for start in range(0, count, GENERATIONS)]

    def run(self, model: DiffusionLM, chosen: Sequence[int], batch: Batches) -> list[results.Row]:
        every = self.openings
        openings = [every[index] for index in chosen]
        found = complete(model, openings, self.texts, self.options, self.seed, self.prompts)
        return [
            results.Generation(self.task, opening.key, text, opening.gold, self._metrics(index, text))
            for index, opening, text in zip(chosen, openings, found)
        ]

    def token_ids(self) -> Iterator[torch.Tensor]:
        for document in self.openings:
            yield self.texts.prompt(document.context)


def document_keys(documents: Sequence[Document]) -> tuple[str, ...]:
    """Keys that two documents share only where their texts are the same."""
    return tuple(
        f"{each.key}@{digest(each.pairs if isinstance(each, Choices) else (each.context, each.gold))}"
        for each in documents
    )


def is_generation(documents: Sequence[Document]) -> bool:
    """Whether documents are answered by generation; those of a task are all of one kind."""
    return isinstance(documents[0], Opening)
