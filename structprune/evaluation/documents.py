"""Documents of evaluation tasks: what is scored or generated for each, and how the outcome is graded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Choices:
    """A document whose continuations are scored."""

    key: str  # unique among all documents of a run; seeds its noise
    pairs: tuple[tuple[str, str], ...]  # (context, continuation) of every answer, delimiters included
    lengths: tuple[int, ...]  # characters of the answers without delimiter, by which lm-eval's acc_norm divides
    gold: int | None = None  # index of the right answer; None where only the task's own code knows it


@dataclass(frozen=True)
class Opening:
    """A document that is continued by generation; key and gold as in `Choices`."""

    key: str
    context: str
    until: tuple[str, ...] = ()  # the text ends before the first of these
    options: Mapping[str, Any] = field(default_factory=dict)  # under lm-eval's names (max_gen_toks) or the sampler's
    gold: str | None = None


Document = Choices | Opening


@dataclass(frozen=True)
class TaskOptions:
    """Which documents of a task are read, and how they are shown."""

    shots: int | None = None  # default the published number (0 for a local task without TRAIN), else the task's own
    limit: int | None = None  # documents per task (of a group, per member)
    seed: int = 1234  # of lm-eval's choice of examples; default its own
    include: str | Path | None = None  # a folder of further lm-eval task files


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
