"""Documents of evaluation tasks: what is scored or generated for each, and how the outcome is graded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol


@dataclass(frozen=True)
class Choices:
    """A document whose continuations are scored.

    Attributes:
        key: unique among all documents of a run; seeds its noise.
        pairs: (context, continuation) of every answer, delimiters included.
        lengths: of the answers without delimiter, in characters, by which lm-eval's acc_norm divides.
        gold: (index of) the right answer; None where only the task's own code knows it.
    """

    key: str
    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int | None = None


@dataclass(frozen=True)
class Opening:
    """A document that is continued by generation.

    Attributes:
        key, gold: as in `Choices`.
        until: the text ends before the first of these.
        options: the task's generation options, under lm-eval's names (max_gen_toks, do_sample) or the sampler's.
    """

    key: str
    context: str
    until: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    gold: str | None = None


Document = Choices | Opening


@dataclass(frozen=True)
class TaskOptions:
    """Which documents of a task are read, and how they are shown.

    Attributes:
        shots: solved examples; None for the published number (0 for a local task without TRAIN), else the task's own.
        limit: documents per task (of a group, per member).
        seed: of lm-eval's choice of examples; default its own.
        include: a folder of further lm-eval task files.
    """

    shots: int | None = None
    limit: int | None = None
    seed: int = 1234
    include: str | Path | None = None


class Task(Protocol):
    """A task of any source; its documents are all of one type."""

    @property
    def name(self) -> str: ...

    @property
    def documents(self) -> Sequence[Document]: ...

    def grade(self, document: Any, outcome: Any, /) -> dict[str, float]:
        """Metrics of one document.

        Args:
            outcome: log-likelihoods in the order of `pairs` (nats), or the generated text.
        """
