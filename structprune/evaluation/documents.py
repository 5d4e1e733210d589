"""Documents of evaluation tasks: what is scored or generated for each, and how an outcome is graded."""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Mapping, Protocol, Sequence


@dataclass(frozen=True)
class Choices:
    """A document whose continuations are scored.

    Attributes:
        key: unique among all documents of a run; seeds its noise.
        pairs: (context, continuation) of every answer, delimiters included.
        lengths: of the answers without delimiter, in characters: what lm-eval's acc_norm divides by.
        gold: index of the right answer; None where the task grades by itself.
    """

    key: str
    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int | None = None


@dataclass(frozen=True)
class Opening:
    """A document that is continued by generation.

    Attributes:
        key: as in `Choices`.
        context: what generation starts from.
        until: the text ends before the first of these.
        options: the task's wishes, in lm-eval's words (max_gen_toks, do_sample) or the sampler's.
        gold: the right answer; None where the task grades by itself.
    """

    key: str
    context: str
    until: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    gold: str | None = None


Document = Choices | Opening


class Task(Protocol):
    """What a driver knows of a task.

    Attributes:
        name: of reports.
        preset: the name its published settings are filed under; no such settings may exist.
        documents: of one kind.
    """

    name: str
    preset: str
    documents: tuple[Document, ...]

    def grade(self, document: Document, outcome: Sequence[float] | str) -> dict[str, float]:
        """Metrics of one document.

        Args:
            outcome: log-likelihoods in the order of `pairs` (nats), or the generated text after the prompt.
        """
